"""Texts as they are stored: short, and without secrets. Standard library only.

A secret is known by the name beside it, by its form, or by its place in an address.
"""

import re
from collections.abc import Iterator, Sequence

__all__ = ["is_secret", "is_whole", "shortened", "without_secrets", "words_without_secrets"]

_LONGEST = 300  # characters of a variable or an argument
_MOST = 4_000  # characters of a text that are looked through
_HIDDEN, _CUT = "(hidden)", "..."
_SECRET = re.compile(
    r"token|secret|passw|passphrase|passcode|credential|apikey|cookie|signature|private|authorization"
    r"|webhook|(?<![a-z])(auth|oauth|creds?|pass|pw|psw|pwd|pswd|pat|sas|dsn|sig|jwt|otp|bearer)(?![a-z])"
    r"|(?<![a-z])(?!(mon|don|tur|whis|hoc|joc|hot|turn|lac|mic|flun)keys?(?![a-z]))[a-z]*keys?(?![a-z])",
    re.IGNORECASE,
)
_KNOWN_SECRET = re.compile(  # texts that are a secret by themselves
    r"gh[pousr]_\w{16,}|github_pat_\w+|glpat-[\w-]{16,}|hf_\w{16,}|sk-[\w-]{16,}|xox[abprs]-[\w-]+"
    r"|[rs]k_live_\w+|npm_\w{16,}|pypi-[\w-]{16,}|dckr_pat_[\w-]+|AIza[\w-]{30,}|ya29\.[\w-]+"
    r"|xai-[\w-]{16,}|gsk_\w{16,}|whsec_[\w+/=]{16,}|SG\.[\w-]{16,}\.[\w-]{16,}|nvapi-[\w-]{16,}"
    r"|r8_\w{16,}|pplx-\w{16,}|hvs\.[\w-]{16,}|glsa_\w{16,}|dop_v1_\w{16,}|shpat_\w{16,}"
    r"|hooks\.slack\.com/services/\S+|A[KS]IA[0-9A-Z]{12,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*|\b[0-9a-f]{40}\b(?=$|[\"',}\s])"
)
_WITH_PASSWORD = re.compile(
    r"(?<=://)(?:[^:@/\s]*:\S+|[^/@\s]+)(?=@)"  # in an address
    r"|(?<![^\s=\"',{[(])[\w.%+-]{1,100}:[^\s/]\S{0,200}(?=@[\w.[-])"  # before a host
)
_OF_USER = re.compile(  # name and password after an option such as --user
    r"((?<![a-z])(?:user(?:[_-]?name)?|login|u)[\"']?\s*[=:\s]\s*[\"']?)[^\s:]+:\S+",
    re.IGNORECASE,
)
_WITH_VALUE = re.compile(r"[=:\s]")  # a text that may hold a name and its value
_OPTION = re.compile(r"--?[\w.-]+\+?=")


def is_secret(name: str) -> bool:
    """Whether the name of a variable or setting looks like that of a secret, such as a token."""
    return _SECRET.search(re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]", " ", name)) is not None


def without_secrets(text: str) -> str:
    """A text with secrets replaced: passwords beside names of users, and known tokens.

    A text with a value and, anywhere in it, the name of a secret is hidden as a whole, but for the
    option that it may begin with: how far the value of that name extends is not known. Of a longer
    text, the first 4,000 characters are returned.
    """
    text = text[:_MOST]
    if is_secret(text) and _WITH_VALUE.search(text):
        option = _OPTION.match(text)
        return f"{option[0] if option else ''}{_HIDDEN}"
    text = _OF_USER.sub(rf"\1{_HIDDEN}", _WITH_PASSWORD.sub(_HIDDEN, text))
    return _KNOWN_SECRET.sub(_HIDDEN, text)


def words_without_secrets(words: Sequence[str]) -> Iterator[str]:
    """The words of a command line; those between the name of a secret and an option are hidden."""
    hides, before = False, ""
    for word in words:
        is_option = word.startswith("-")
        hides = hides and not is_option
        of_user = _OF_USER.search(f"{before} {word}")
        # Name of the option in the word before, and its value in this word.
        hides_word = of_user is not None and of_user.start() < len(before) < of_user.end() - 1
        yield _HIDDEN if hides or hides_word else shortened(without_secrets(word))
        before = word
        hides |= is_secret(word) and (is_option or _WITH_VALUE.search(word) is not None)


def shortened(text: str) -> str:
    """A text of at most 300 characters; the end of a longer text is replaced by three dots."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - len(_CUT)] + _CUT


def is_whole(text: str) -> bool:
    """Whether nothing of a text that was stored is hidden or cut."""
    is_cut = len(text) == _LONGEST and text.endswith(_CUT)
    return not is_cut and _HIDDEN not in text
