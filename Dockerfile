# The server with the CPU build of torch; TORCH_INDEX_URL names another index to take it from.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/polyadapt
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY server server
COPY adapters_store adapters_store
RUN /opt/polyadapt/bin/pip install --no-cache-dir \
        -c constraints/cpu.txt --extra-index-url "${TORCH_INDEX_URL}" .

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
# The compiler builds the CPU kernel for this machine's instructions at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /home/polyadapt polyadapt \
    && install --directory --owner=polyadapt --group=polyadapt /data
COPY --from=build /opt/polyadapt /opt/polyadapt
ENV PATH=/opt/polyadapt/bin:$PATH \
    POLYADAPT_HOME=/data \
    POLYADAPT_HOST=0.0.0.0 \
    POLYADAPT_PORT=8000 \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/polyadapt
VOLUME /data
EXPOSE 8000
# The first start fetches the model and compiles the kernel.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['POLYADAPT_PORT'] + '/health', timeout=4)"]
# Another address than loopback needs a key: set POLYADAPT_API_KEY, or the server says so and ends.
ENTRYPOINT ["polyadapt", "serve"]
CMD ["--model", "smollm2", "--demo"]
