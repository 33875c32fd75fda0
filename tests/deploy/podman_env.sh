# To be sourced: podman's settings for machines where root lacks CAP_SYS_RESOURCE and nothing runs systemd. A user's own
# configuration wins.
if [ -z "${CONTAINERS_CONF:-}" ]; then
    CONTAINERS_CONF=${TMPDIR:-/tmp}/baton-containers.conf
    cat > "$CONTAINERS_CONF" <<'CONF'
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
    export CONTAINERS_CONF
fi
