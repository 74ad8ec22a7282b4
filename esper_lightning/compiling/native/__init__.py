"""Native code for a CPU: traced functions as C++ without any header of torch, compiled in seconds.

``values`` says what a tensor is in the generated code, ``operations`` what each operation of torch
becomes, ``nests`` how the results are grouped into loops, ``products`` how matrices are multiplied,
``library`` how the code is compiled and cached, and ``loops`` how it is called.
"""
