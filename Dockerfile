# The core package, which runs esper; g++ is for native code.
#   docker build -t esper . && docker run -v "$PWD:/work" esper fit --config cartpole
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY scripts/torchrun.sh scripts/
COPY esper_lightning esper_lightning
RUN pip install --no-cache-dir --constraint constraints.txt .
ENV PYTHONUNBUFFERED=1
WORKDIR /work
# No shell form: a shell as process 1 would not pass SIGTERM on, and no evidence would be saved at an eviction.
ENTRYPOINT ["esper"]
CMD ["--help"]
