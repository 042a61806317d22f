# A container for the CPU. PyTorch's own index has wheels without CUDA, which are some gigabytes smaller; pip takes
# 2.x.y+cpu before 2.x.y.
#
#     docker build -t sparse-exp .
#     docker run --rm -v "$PWD/outputs:/work/outputs" -v sparse-exp-cache:/cache sparse-exp dry_run=true
#
# Data sets and downloads lie below /cache. It runs as user 1000; --user "$(id -u)" for outputs that are another's.
FROM python:3.11-slim
COPY pyproject.toml constraints.txt README.md LICENSE /opt/sparse-exp/
COPY conf /opt/sparse-exp/conf
COPY hydra_plugins /opt/sparse-exp/hydra_plugins
COPY sparse_exp /opt/sparse-exp/sparse_exp
RUN pip install --no-cache-dir --constraint /opt/sparse-exp/constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu '/opt/sparse-exp[train]' \
    && useradd --create-home --uid 1000 sparse \
    && mkdir -m 1777 /work /cache
ENV SPARSE_EXP_CACHE=/cache USER=sparse
USER sparse
WORKDIR /work
ENTRYPOINT ["sparse-exp"]
