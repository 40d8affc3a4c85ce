"""What does a stock MooncakeKVManager do? This process holds one, on host memory, without model or scheduler.

    stock_manager.py prefill|decode LOG

It answers each line of JSON on stdin, {"do": COMMAND, ...}, with a line of JSON on stdout, and appends every log record
to the file LOG as a line of JSON. The commands are the methods of ManagerProcess. It runs in the environment of an
SGLang release (0.4.7 to 0.5.23), so it imports nothing of the tests.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import inspect
import json
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
import types
import unittest.mock
from typing import Any, TextIO

LAYERS = 2
PAGES = 64
PAGE_BYTES = 4096
AUX_SLOTS = 8
AUX_BYTES = 256
PROBE_THREAD = "MooncakeFailedSessionProbe"
CONNECTORS = ("common", "mooncake", "ascend")
ENGINE = "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
OLD_ENGINE = "sglang.srt.disaggregation.mooncake.transfer_engine"  # to 0.5.8.post1
PR_SET_PDEATHSIG = 1
HOST = os.environ.get("SGLANG_HOST_IP", "127.0.0.1")


def end_with_parent() -> None:
    """Have the kernel kill this process, also a stopped one, when the test run that started it is gone."""
    if os.getppid() != 1:  # in an emulated machine; the parent would be the thread that has started this process
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def take_stdout() -> TextIO:
    """Keep stdout for the answers: what Mooncake and SGLang print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


class JsonLines(logging.Handler):
    """Writes each log record as one line of JSON."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.INFO)
        self._file = open(path, "a")  # noqa: SIM115

    def emit(self, record: logging.LogRecord) -> None:
        line = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


def wait_until_listening(port: int, deadline_s: float = 20) -> None:
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            socket.create_connection((HOST, port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def takes(callee: Any, parameter: str) -> bool:
    return parameter in inspect.signature(callee).parameters


class Memory:
    """The pages and the aux slots that a manager registers; the K buffers of all layers, then the V buffers."""

    def __init__(self) -> None:
        import numpy

        # One piece: the Ascend connector of older releases registers it as one.
        self.pages = list(numpy.zeros((2 * LAYERS, PAGES, PAGE_BYTES), numpy.uint8))
        self.aux = numpy.zeros((AUX_SLOTS, AUX_BYTES), numpy.uint8)

    def fill(self, seed: int) -> None:
        for i, buffer in enumerate(self.pages):
            for page in range(PAGES):
                buffer[page] = (17 * i + 3 * page + seed) % 251

    def digest(self, pages: list[int]) -> str:
        return hashlib.sha256(b"".join(buffer[page].tobytes() for page in pages for buffer in self.pages)).hexdigest()

    def kv_args(self) -> Any:
        """SGLang's KVArgs with every field that one of the releases reads."""
        from sglang.srt.disaggregation.base.conn import KVArgs

        args = KVArgs()
        per_component: dict[str, list[Any]] = {
            "state_types": [],
            "state_data_ptrs": [],
            "state_data_lens": [],
            "state_item_lens": [],
            "state_layer_ids": [],
            "state_dim_per_tensor": [],
            "state_slice_outer_counts": [],
            "state_conv_shard_groups": [],
        }
        for name, value in {
            "engine_rank": 0,
            "pp_rank": 0,
            "system_dp_rank": 0,
            "rust_http_port": None,
            "kv_cache_dtype_str": "auto",
            "kv_layout": None,
            "prefill_start_layer": 0,
            "prefill_end_layer": LAYERS,
            "kv_data_ptrs": [buffer.ctypes.data for buffer in self.pages],
            "kv_data_lens": [buffer.nbytes for buffer in self.pages],
            "kv_item_lens": [PAGE_BYTES] * len(self.pages),
            "kv_layer_ids": [],
            "num_draft_entries": 0,
            "kv_head_num": 2,
            "total_kv_head_num": 2,
            "page_size": 1,
            "aux_data_ptrs": [self.aux.ctypes.data],
            "aux_data_lens": [self.aux.nbytes],
            "aux_item_lens": [AUX_BYTES],
            "ib_device": "",
            "gpu_id": 0,
            "is_hybrid_mla_backend": False,
            "mla_compression_ratios": None,
            "swa_kv_cache_layout": None,
            "ib_traffic_class": "",
            **per_component,
        }.items():
            setattr(args, name, value)
        return args


class Release:
    """What differs between the releases: where a manager finds its configuration."""

    def __init__(self) -> None:
        try:
            from sglang.srt import runtime_context
        except ImportError:
            runtime_context = None
        self.context = runtime_context if hasattr(runtime_context, "publish") else None
        self.get_parallel = getattr(runtime_context, "get_parallel", None)

    def configure(self, role: str, bootstrap_port: int) -> Any:
        """Put the configuration of a node in that role where this release looks for it; return the server_args."""
        if self.context is None:
            self._be_alone()
            if self.get_parallel is not None:
                self._answer_for_process_groups(self.get_parallel())
            return self._plain_server_args(bootstrap_port)
        from sglang.srt.server_args import ServerArgs

        switch = {"enable_pd_role_switch": True}
        server_args = ServerArgs(
            model_path="dummy",  # resolved without reading a model's configuration
            device="cpu",
            host=HOST,
            disaggregation_mode=role,
            disaggregation_transfer_backend="mooncake",
            disaggregation_bootstrap_port=bootstrap_port,
            **(switch if takes(ServerArgs, *switch) else {}),
        )
        if takes(self.context.publish, "ranks"):
            ranks = self.context.SpawnRanks(world_rank=0, gpu_id=0)
            self.context.publish(server_args, role="scheduler", ranks=ranks)
            self.context.get_parallel().override_permanently(pp_group=None)  # as initialize_model_parallel does
        else:
            self.context.publish(server_args, role="scheduler")
            self._be_alone()
            self._answer_for_process_groups(self.context.get_parallel())
        return server_args

    def _answer_for_process_groups(self, parallel: Any) -> None:
        """Let what SGLang would ask of process groups be answered as for a single rank."""
        asked = [name for name, value in vars(type(parallel)).items() if isinstance(value, property)]
        answers = {name: int(name.endswith("_size")) for name in asked if name.endswith(("_rank", "_size"))}
        self.alone = parallel.override(**answers)  # kept, because its end takes them back
        self.alone.__enter__()

    @staticmethod
    def _plain_server_args(bootstrap_port: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            host=HOST,
            port=0,
            disaggregation_bootstrap_port=bootstrap_port,
            dist_init_addr=None,
            enable_dp_attention=False,
            tp_size=1,
            dp_size=1,
            pp_size=1,
            nnodes=1,
            load_balance_method="round_robin",
            kv_cache_dtype="auto",
            enable_hisparse=False,
            chunked_prefill_size=2048,
            enable_trace=False,
        )

    @staticmethod
    def _be_alone() -> None:
        """Let the manager be the only rank, at HOST, wherever this release imports the functions that ask."""
        single = {"get_attention_tp_size": 1, "get_attention_cp_size": 1, "get_attention_dp_size": 1}
        first = {"get_attention_tp_rank": 0, "get_attention_cp_rank": 0, "get_attention_dp_rank": 0}
        address = {"get_local_ip_by_remote": HOST, "get_local_ip_auto": HOST}
        last_stage = {"get_pp_group": types.SimpleNamespace(is_last_rank=True)}
        for connector in CONNECTORS:
            module = sys.modules.get(f"sglang.srt.disaggregation.{connector}.conn")
            for name, value in {**single, **first, **address, **last_stage}.items():
                if hasattr(module, name):
                    setattr(module, name, lambda *_, value=value: value)


class ManagerProcess:
    """The managers of this process, one after another; each command acts on the newest."""

    def __init__(self) -> None:
        import sglang
        from sglang.srt.disaggregation.mooncake import conn

        self.conn = conn
        self.sglang_folder = str(pathlib.Path(sglang.__file__).parent)
        self.release = Release()
        self.memory = Memory()
        self.bootstrap_port = 0
        self.bootstrap_server: Any = None
        self.manager: Any = None
        self.names = {
            "manager": "MooncakeKVManager",
            "blacklist": "failed_sessions",
            "lock": "session_lock",
        }
        self.transfers: dict[int, Any] = {}

    def call(self, **names: str) -> dict[str, Any]:
        """Tell what this build of SGLang calls its `manager`, `blacklist` or `lock`."""
        self.names.update(names)
        return {}

    def use_ascend(self) -> dict[str, Any]:
        """Let the managers be those of the Ascend connector. Its transfer library, which only an NPU can run, is
        replaced by Mooncake over TCP; the connector and its engine are SGLang's own.

        Answer which arguments the Ascend manager does not take though the Mooncake connector may pass them."""
        for library in ("mf_adapter", "memfabric_hybrid"):  # to 0.5.6.post2; later
            sys.modules[library] = types.ModuleType(library)
            sys.modules[library].TransferEngine = ascend_library()  # type: ignore[attr-defined]
        self.conn = importlib.import_module("sglang.srt.disaggregation.ascend.conn")
        self.names["manager"] = "AscendKVManager"
        passed = inspect.signature(self.conn.MooncakeKVManager.send_kvcache).parameters
        return {"not_taken": [name for name in passed if not takes(self._manager_class().send_kvcache, name)]}

    def make(self, role: str, environment: dict[str, str]) -> dict[str, Any]:
        """Construct a manager; answer its session, or the sentence with which the settings were refused."""
        try:
            with unittest.mock.patch.dict(os.environ, environment):
                self._construct(self._manager_class(), role)
        except ValueError as error:
            return {"refused": str(error)}
        return {"session": self.manager.get_session_id(), "bootstrap": f"{HOST}:{self.bootstrap_port}"}

    def make_while_transfers_fail(self, session: str, more: list[str]) -> dict[str, Any]:
        """Construct a prefill manager. `session` fails as soon as the stock constructor has made the blacklist, and
        from then on one of `more` every millisecond, on a thread of its own that goes on until all have failed."""
        from_worker: list[threading.Thread] = []

        def fail_more(manager: Any) -> None:
            for other in more:
                fail(manager, other)
                time.sleep(0.001)

        class FailsEarly(self._manager_class()):  # type: ignore[misc]
            def __setattr__(manager, name: str, value: Any) -> None:
                object.__setattr__(manager, name, value)
                if name == "session_lock":
                    fail(manager, session)
                    from_worker.append(threading.Thread(target=fail_more, args=(manager,)))
                    from_worker[0].start()

        self._construct(FailsEarly, "prefill")
        from_worker[0].join()
        return {}

    def _manager_class(self) -> Any:
        return getattr(self.conn, self.names["manager"])

    def _engine_module(self) -> Any:
        return sys.modules.get(OLD_ENGINE) or importlib.import_module(ENGINE)

    def _construct(self, manager_class: Any, role: str) -> None:
        from sglang.srt.disaggregation.utils import DisaggregationMode

        if role == "prefill" and self.bootstrap_server is None:
            self.bootstrap_port = free_port()
            server = self.conn.MooncakeKVBootstrapServer
            host = [HOST] if takes(server, "host") else []
            self.bootstrap_server = server(*host, self.bootstrap_port)
            wait_until_listening(self.bootstrap_port)
        server_args = self.release.configure(role, self.bootstrap_port)
        if hasattr(self._engine_module(), "init_mooncake_transfer_engine"):
            self._engine_module().init_mooncake_transfer_engine(HOST, 0, None)  # the first call makes it
        self.manager = manager_class(self.memory.kv_args(), DisaggregationMode(role), server_args, False)

    def fill(self, seed: int) -> dict[str, Any]:
        self.memory.fill(seed)
        return {}

    def digest(self, pages: list[int]) -> dict[str, Any]:
        return {"sha256": self.memory.digest(pages)}

    def receive(self, room: int, pages: list[int], bootstrap: str, register: bool = False) -> dict[str, Any]:
        """Decode: hand the destination pages to the prefill at `bootstrap`, after registering again if so asked."""
        import numpy

        if register:
            with self.manager.connection_lock:
                self.manager.connection_pool.clear()
        if hasattr(self.manager, "try_ensure_parallel_info") and not self.manager.try_ensure_parallel_info(bootstrap):
            raise RuntimeError(f"no answer from the prefill's bootstrap server {bootstrap}")
        receiver = self.transfers[room] = self.conn.MooncakeKVReceiver(self.manager, bootstrap, room)
        indices = numpy.array(pages, numpy.int32)
        if takes(receiver.init, "kv_indices"):
            receiver.init(indices, 0)
        else:
            receiver.init(0)
            receiver.send_metadata(indices, 0)
        return {}

    def await_receiver(self, room: int) -> dict[str, Any]:
        """Prefill: wait until decode has handed over its pages."""
        own = f"{HOST}:{self.bootstrap_port}"
        self.transfers[room] = self.conn.MooncakeKVSender(self.manager, own, room, *self.sender_ranks())
        return self._outcome(room, "WaitingForInput", 20)

    def sender_ranks(self) -> list[Any]:
        """The arguments dest_tp_ranks and pp_rank of a sender, where it has them."""
        return [[0], 0] if takes(self.conn.MooncakeKVSender, "dest_tp_ranks") else []

    def send(self, room: int, pages: list[int]) -> dict[str, Any]:
        """Prefill: start to send the source pages."""
        import numpy

        sender = self.transfers[room]
        sender.init(len(pages), 0)
        sender.send(numpy.array(pages, numpy.int32))
        return {}

    def finish(self, room: int, wait_s: float) -> dict[str, Any]:
        """Wait for the end of a transfer; answer its status and, if it failed, SGLang's reason."""
        outcome = self._outcome(room, "Success", wait_s)
        transfer = self.transfers.pop(room)
        if outcome["status"] == "Success":
            transfer.clear()
        elif outcome["status"] == "Failed":
            outcome["reason"] = failure_reason(transfer)
        return outcome

    def _outcome(self, room: int, wanted: str, wait_s: float) -> dict[str, Any]:
        from sglang.srt.disaggregation.base.conn import KVPoll

        names = {getattr(KVPoll, name): name for name in vars(KVPoll) if name[0].isupper()}
        deadline = time.monotonic() + wait_s
        while True:
            status = self.transfers[room].poll()
            if status in (KVPoll.Failed, getattr(KVPoll, wanted)) or time.monotonic() > deadline:
                return {"status": names[status]}
            time.sleep(0.002)

    def blacklist(self, session: str) -> dict[str, Any]:
        """Blacklist a session as transfer_worker does after a failed transfer."""
        fail(self.manager, session, self.names["blacklist"], self.names["lock"])
        return {}

    def state(self) -> dict[str, Any]:
        """The blacklist (None in the decode role) and the threads of this process."""
        failed_sessions = getattr(self.manager, self.names["blacklist"], None)
        threads = threading.enumerate()
        state = {
            "failed_sessions": None,
            "threads": sorted(thread.name for thread in threads),
            "probe_loops": [file_of_body(thread) for thread in threads if thread.name == PROBE_THREAD],
        }
        if failed_sessions is not None:
            with getattr(self.manager, self.names["lock"]):
                state["failed_sessions"] = sorted(failed_sessions)
                state["session_failures"] = dict(self.manager.session_failures)
        return state

    def code(self) -> dict[str, Any]:
        """Whose code runs here: SGLang's folder, methods that come from elsewhere, the blacklist's type."""
        owners = [self._manager_class(), getattr(self._engine_module(), "MooncakeTransferEngine", None)]
        return {
            "sglang": self.sglang_folder,
            "foreign_methods": sorted(
                f"{owner.__name__}.{name}"
                for owner in owners
                if owner is not None
                for name, value in vars(owner).items()
                if not self._is_sglangs(value)
            ),
            "plain_blacklist": type(getattr(self.manager, self.names["blacklist"], None)) is set,
            "native_probe": hasattr(self._manager_class(), "_failed_session_probe_loop"),
            "wrapt": "wrapt" in sys.modules,
        }

    def _is_sglangs(self, value: Any) -> bool:
        code = getattr(getattr(value, "__func__", value), "__code__", None)
        wrapped = type(value).__module__.partition(".")[0] == "wrapt"
        return not wrapped and (code is None or code.co_filename.startswith(self.sglang_folder))

    def counter(self) -> dict[str, Any]:
        """The value of sglang:failed_session_recoveries_total; None where nobody has registered it."""
        import prometheus_client

        return {"value": prometheus_client.REGISTRY.get_sample_value("sglang:failed_session_recoveries_total")}

    def teardown(self) -> dict[str, Any]:
        """Tear the manager down; answer how long its probe loop went on, and how long all of it took, in seconds."""
        loops = [thread for thread in threading.enumerate() if thread.name == PROBE_THREAD]
        ended: list[float] = []
        watchers = [threading.Thread(target=lambda t=t: (t.join(), ended.append(time.monotonic()))) for t in loops]
        for watcher in watchers:
            watcher.daemon = True
            watcher.start()
        started = time.monotonic()
        self.manager.teardown()
        returned = time.monotonic()
        for watcher in watchers:
            watcher.join(5)
        return {"loops_s": [end - started for end in ended], "teardown_s": returned - started, "loops": len(loops)}


def ascend_library() -> type:
    """What the Ascend engine takes for its transfer library."""
    from mooncake.engine import TransferEngine

    class OverTcp(TransferEngine):  # type: ignore[misc]
        TransDataOpType = types.SimpleNamespace(SDMA=None)

        def __init__(self) -> None:
            super().__init__()
            assert super().initialize(HOST, "P2PHANDSHAKE", "tcp", "") == 0

        def initialize(self, *address: Any) -> int:
            return 0

    return OverTcp


def fail(manager: Any, session: str, blacklist: str = "failed_sessions", lock: str = "session_lock") -> None:
    with getattr(manager, lock):
        manager.session_failures[session] += 1
        getattr(manager, blacklist).add(session)


def failure_reason(transfer: Any) -> str:
    try:
        transfer.failure_exception()
    except Exception as error:
        return str(error)
    return ""


def file_of_body(thread: threading.Thread) -> str:
    """The file of the function that a thread runs."""
    frame = sys._current_frames().get(thread.ident or 0)
    file = ""
    while frame:
        if frame.f_code.co_filename != threading.__file__:
            file = frame.f_code.co_filename
        frame = frame.f_back
    return file


def main(role: str, log: str) -> None:
    end_with_parent()
    answers = take_stdout()
    logging.basicConfig(level=logging.INFO, handlers=[logging.StreamHandler(sys.stderr), JsonLines(log)])
    process = ManagerProcess()

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(ready=role)
    for line in sys.stdin:
        arguments = json.loads(line)
        command = arguments.pop("do")
        if command == "exit":
            return
        try:
            answer(**getattr(process, command)(**arguments))
        except Exception:
            answer(error=traceback.format_exc())
    os._exit(0)  # stdin is closed: the test run is over


if __name__ == "__main__":
    main(*sys.argv[1:])
