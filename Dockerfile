# Lockstep with its server, as a normal user.
#
#   docker build --build-arg KIND=cpu  -t lockstep:cpu .
#   docker build --build-arg KIND=cuda -t lockstep:cuda .
#   docker run --rm lockstep:cpu lockstep quickstart
#   docker run --rm --gpus all --shm-size 8g -v $PWD/runs:/home/lockstep/runs lockstep:cuda lockstep train config.toml
#
# The image holds no driver: CUDA's libraries come with the wheels, the driver with the host.
FROM python:3.11-slim-bookworm AS wheel
RUN pip install --no-cache-dir "uv>=0.9"
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
COPY runtime runtime
COPY examples examples
RUN uv build --wheel --out-dir /dist

FROM python:3.11-slim-bookworm
ARG KIND=cpu
# A C compiler: torch.compile and Triton build kernels at run time.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 lockstep
# By number, as Kubernetes' runAsNonRoot wants it.
USER 1000
WORKDIR /home/lockstep
ENV PATH=/home/lockstep/env/bin:$PATH
COPY --from=wheel /dist /tmp/dist
RUN python -m venv env \
    && if [ "$KIND" = cpu ]; then export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi \
    && pip install --no-cache-dir "$(ls /tmp/dist/*.whl)[train,gguf,examples]" "uv>=0.9" \
    && UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 lockstep runtime install --kind "$KIND"
CMD ["lockstep", "doctor"]
