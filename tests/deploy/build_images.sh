#!/usr/bin/env bash
# Builds the images of compose.yaml with podman, as `make test-containers` needs them.
#
# Where no registry can be reached, stand-ins for the public base images are made of Debian packages first (mmdebstrap),
# under the public names, so that services/Dockerfile and compose.yaml are used as they are. A pip configuration of this
# machine (a local index, a certificate, a folder of wheels) is handed to the build.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/deploy/podman_env.sh

PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
REDIS_IMAGE=docker.io/library/redis:7-bookworm
PROMETHEUS_IMAGE=$(grep -o 'docker.io/prom/prometheus:[^ ]*' compose.yaml)
CERTIFICATES=/etc/ssl/certs/ca-certificates.crt

mounts=(-v "$CERTIFICATES:$CERTIFICATES:ro")
pip_conf=$(mktemp)
trap 'rm -f "$pip_conf"' EXIT
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    printf '[global]\nfind-links = %s\n' "$PIP_FIND_LINKS" > "$pip_conf"
    mounts+=(-v "$PIP_FIND_LINKS:$PIP_FIND_LINKS:ro" -v "$pip_conf:/etc/pip.conf:ro")
fi

make_stand_ins() {
    local work
    work=$(mktemp -d)
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv,redis-server bookworm "$work/base.tar"
    podman import --quiet --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        "$work/base.tar" localhost/bookworm
    printf 'FROM localhost/bookworm\nRUN ln -sf python3 /usr/bin/python\n' \
        | podman build --quiet -t "$PYTHON_IMAGE" -f - "$work"
    podman tag "$PYTHON_IMAGE" "$REDIS_IMAGE"
    rm -rf "$work"
}

# Another version than its name says: Debian's.
make_prometheus_stand_in() {
    echo "$PROMETHEUS_IMAGE cannot be pulled: Debian's Prometheus stands in for it"
    printf '%s\n' "FROM $PYTHON_IMAGE" \
        'RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus' \
        'USER nobody' 'ENTRYPOINT ["/usr/bin/prometheus"]' \
        | podman build --quiet --network host -t "$PROMETHEUS_IMAGE" -f - "$(mktemp -d)"
}

if ! podman image exists "$PYTHON_IMAGE" || ! podman image exists "$REDIS_IMAGE"; then
    timeout 60 podman pull --quiet "$PYTHON_IMAGE" "$REDIS_IMAGE" || make_stand_ins
fi
if ! podman image exists "$PROMETHEUS_IMAGE"; then
    timeout 60 podman pull --quiet "$PROMETHEUS_IMAGE" || make_prometheus_stand_in
fi
for target in router worker; do
    podman build --network host --format docker "${mounts[@]}" -f services/Dockerfile --target "$target" \
        --build-arg REVISION="$(git rev-parse HEAD)" ${SOURCE_URL:+--build-arg SOURCE="$SOURCE_URL"} \
        ${TORCH_INDEX:+--build-arg TORCH_INDEX="$TORCH_INDEX"} -t "baton-$target" .
done
podman images --format '{{.Repository}} {{.Size}}' | grep '/baton-'
