# A container for the CPU: docker build -t sparse-exp . && docker run --rm -v "$PWD/outputs:/work/outputs" sparse-exp dry_run=true
# Data sets and downloads lie below /cache: keep them with -v sparse-exp-cache:/cache.
FROM python:3.11-slim
WORKDIR /opt/sparse-exp
COPY . .
# PyTorch's own index has wheels without CUDA, which are some gigabytes smaller.
RUN pip install --no-cache-dir --constraint constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu torch torchvision \
    && pip install --no-cache-dir --constraint constraints.txt '.[train]' \
    && mkdir -p /work /cache
ENV SPARSE_EXP_CACHE=/cache
WORKDIR /work
ENTRYPOINT ["sparse-exp"]
