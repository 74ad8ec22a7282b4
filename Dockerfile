# The core package, which runs esper; g++ is for native code.
#   docker build -t esper . && docker run -v "$PWD:/work" esper fit --config cartpole
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /package
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY esper_lightning esper_lightning
COPY scripts/torchrun.sh scripts/
# PyTorch for CPUs; for CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch \
    && pip install --no-cache-dir -c constraints.txt .
RUN useradd --create-home esper
USER esper
WORKDIR /work
ENTRYPOINT ["esper"]
CMD ["--help"]
