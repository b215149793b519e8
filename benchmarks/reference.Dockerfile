# LLaMA-Factory in an image of the structure of its own docker/docker-cuda at 0.9.3, for
# benchmarks/image.py: an image with torch, the requirements as a layer, the whole source, and
# only then the installation with its extras. Any edit of the source does that again.
#
# BASE_IMAGE is stage `torch` of docker/Dockerfile, so both sides stand on the same layers, and
# constraints.txt is the lock without its hashes, so they install the same versions. The context
# holds the unpacked source archive of LLaMA-Factory as `source`, and what pip needs as `tools`.
ARG BASE_IMAGE
# hadolint ignore=DL3006 # tagged by who builds
FROM ${BASE_IMAGE}
ARG ENVIRONMENT
ARG PIP_INDEX=https://pypi.org/simple
ARG EXTRAS=metrics
ENV PATH="${ENVIRONMENT}/bin:${PATH}" \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_CONSTRAINT=/mnt/constraints.txt
# hadolint ignore=DL3002
USER 0:0
WORKDIR /reference

# The base's environment was made by uv and has no pip.
RUN --mount=type=bind,source=tools,target=/mnt \
    --mount=type=secret,id=ca \
    [ ! -e /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca; \
    python /mnt/pip.whl/pip install --no-cache-dir --index-url "${PIP_INDEX}" \
        pip packaging wheel setuptools

COPY source/requirements.txt /reference/
RUN --mount=type=bind,source=tools,target=/mnt \
    --mount=type=secret,id=ca \
    [ ! -e /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca; \
    pip install --no-cache-dir --index-url "${PIP_INDEX}" -r /reference/requirements.txt

COPY source /reference
RUN --mount=type=bind,source=tools,target=/mnt \
    --mount=type=secret,id=ca \
    [ ! -e /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca; \
    pip install --no-cache-dir --index-url "${PIP_INDEX}" --no-build-isolation \
        -e "/reference[${EXTRAS}]"
