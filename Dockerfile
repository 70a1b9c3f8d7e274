# The server. VARIANT chooses torch's build: cpu (from TORCH_INDEX_URL), or cuda (the package index's
# own build for Linux, which brings the CUDA libraries; the node brings the driver).
#   docker build --build-arg VARIANT=cuda --tag polyadapt:0.1.0-cuda .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS dependencies
ARG VARIANT=cpu
# Empty: pip's own configuration says where torch comes from.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Of pyproject.toml: a shared registry, a shared store of adapters, traces.
ARG EXTRAS=postgres,object-store,otel
WORKDIR /src
RUN python3 -m venv /opt/polyadapt
COPY pyproject.toml ./
COPY constraints constraints
# Requirements without the code: a change of code leaves this, the large layer, as it is.
RUN set -eu; \
    case "${VARIANT}" in \
        cpu) index="${TORCH_INDEX_URL}" ;; \
        cuda) index="" ;; \
        *) echo "VARIANT is '${VARIANT}', expected cpu or cuda" >&2; exit 1 ;; \
    esac; \
    python3 -c 'import sys, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [project["optional-dependencies"][name] for name in sys.argv[1].split(",") if name]; \
print(*project["dependencies"], *sum(extras, []), sep="\n")' "${EXTRAS}" > requirements.txt; \
    /opt/polyadapt/bin/pip install --no-cache-dir --disable-pip-version-check \
        --constraint constraints/cpu.txt ${index:+--extra-index-url "${index}"} \
        --requirement requirements.txt

FROM dependencies AS wheel
COPY README.md LICENSE ./
COPY server server
COPY adapters_store adapters_store
RUN /opt/polyadapt/bin/pip wheel --no-cache-dir --disable-pip-version-check --no-deps \
        --constraint constraints/cpu.txt --wheel-dir /dist .

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
# The compiler builds the CPU kernel for this machine's instructions at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/debconf/* /var/log/* \
    && groupadd --gid 10001 polyadapt \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data polyadapt \
    && install --directory --owner=polyadapt --group=polyadapt /data
COPY --from=dependencies /opt/polyadapt /opt/polyadapt
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/polyadapt/bin/pip install --no-cache-dir --disable-pip-version-check --no-index --no-deps \
        /dist/*.whl
# Everything that is ever written lies under /data or /tmp: the root may be read-only.
ENV PATH=/opt/polyadapt/bin:$PATH \
    HOME=/data \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/triton \
    POLYADAPT_HOME=/data \
    POLYADAPT_HOST=0.0.0.0 \
    POLYADAPT_PORT=8000 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
# The first start fetches the model and compiles the kernel.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['POLYADAPT_PORT'] + '/health', timeout=4)"]
# Another address than loopback needs a key: set POLYADAPT_API_KEY, or the server says so and ends.
ENTRYPOINT ["polyadapt", "serve"]
CMD ["--model", "smollm2", "--demo"]
