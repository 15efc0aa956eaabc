"""The contenders of benchmarks.llm and .serve: transformers, torch.compile, llama.cpp on one checkpoint's weights."""

import random
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs

from taskgraph.models.config import ModelConfig
from taskgraph.serving.requests import Request

if TYPE_CHECKING:
    from taskgraph.models.weights import Checkpoint

PROMPT = CONTEXT = 512
BATCHES = (1, 8, 32)
PREFILL = f"prefill_{PROMPT}"
TOKENS = {PREFILL: PROMPT, **{f"decode_{batch}": batch for batch in BATCHES}}
"""The cases of benchmarks.llm, with the tokens of a step."""

TORCH_DTYPES = ("bfloat16", "float32")

Run = Callable[[], Any]


def prompt(config: ModelConfig, count: int) -> list[int]:
    """Fixed pseudo-random token numbers."""
    draw = random.Random(0)
    return [draw.randrange(config.vocab_size) for _ in range(count)]


# -- transformers -------------------------------------------------------------------------------------------------


def transformers_models(checkpoint: "Checkpoint") -> dict[str, Any]:
    """LlamaForCausalLM with the checkpoint's weights, in every dtype of TORCH_DTYPES."""
    import torch
    import transformers

    c = checkpoint.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_context,
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict({n: checkpoint.tensor(n) for n in checkpoint.names()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit transformers: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return {dtype: deepcopy(model).eval().to(getattr(torch, dtype)) for dtype in TORCH_DTYPES}


def transformers_run(model: Any, config: ModelConfig, case: str) -> Run:
    """One step of transformers; the dynamic cache is filled once, and cut back after each step."""
    import torch
    import transformers

    ids = torch.tensor(prompt(config, TOKENS[case]))
    if case == PREFILL:

        def prefill() -> Any:
            with torch.inference_mode():
                return model(ids.view(1, PROMPT), use_cache=True, logits_to_keep=1).logits

        return prefill
    batch = TOKENS[case]
    position = torch.full((batch, 1), CONTEXT, dtype=torch.int64)
    cache = transformers.DynamicCache()
    shape = (batch, config.kv_heads, CONTEXT, config.head_dim)
    with torch.inference_mode():
        for layer in range(config.layers):
            cache.update(*(torch.randn(shape, dtype=model.dtype) * 0.5 for _ in range(2)), layer)

    def decode() -> Any:
        with torch.inference_mode():
            made = model(ids.view(batch, 1), past_key_values=cache, position_ids=position, logits_to_keep=1).logits
            cache.crop(-1)
        return made

    return decode


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after `seconds`."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled_run(model: Any, config: ModelConfig, case: str, limit_s: float, say: Callable[[str], None]) -> Run | None:
    """transformers_run of a torch.compile'd model, already compiled; None when that fails or takes too long."""
    import torch

    try:
        with time_limit(limit_s):
            run = transformers_run(torch.compile(model, dynamic=False), config, case)
            run()
            run()
    except Exception as error:  # any failure of the peer's compiler means "not available", and is reported
        say(f"torch.compile of {case}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return None
    return run


# -- llama.cpp ----------------------------------------------------------------------------------------------------


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python can be imported."""
    return find_spec("llama_cpp") is not None


def plain_gguf(source: Path, kind: str = "bf16") -> Path:
    """The checkpoint as a GGUF of `kind` ("bf16" or "f32") in the user's cache; vectors are float32 in both, as
    llama.cpp's converter has them."""
    target = platformdirs.user_cache_path("taskgraph") / "benchmarks" / f"{source.stem}-to-{kind}.gguf"
    if target.is_file() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    try:
        _write_plain(source, partial, kind)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _write_plain(source: Path, target: Path, kind: str) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    own = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if not key.startswith(own):
            listed = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if listed else None)
    writer.add_file_type({"bf16": gguf.LlamaFileType.MOSTLY_BF16, "f32": gguf.LlamaFileType.ALL_F32}[kind])
    stored_as = {"bf16": gguf.GGMLQuantizationType.BF16, "f32": gguf.GGMLQuantizationType.F32}[kind]
    for stored in reader.tensors:
        shape = [int(n) for n in reversed(stored.shape)]
        data = gguf.quants.dequantize(stored.data, stored.tensor_type).astype(np.float32).reshape(shape)
        if len(shape) == 1:
            writer.add_tensor(stored.name, data)
        else:
            writer.add_tensor(stored.name, gguf.quants.quantize(data, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(slots=True)
class Slot:
    """A request that llama.cpp serves: how much of its prompt is in, and what it has answered."""

    prompt: Sequence[int]
    most: int
    answer: list[int]
    done: int = 0


def next_rows(running: Mapping[int, Slot], room: int) -> list[tuple[int, int, int, bool]]:
    """The next batch of at most `room` rows as `LlamaCpp._fill` takes them: first those that decode."""
    rows = [
        (each.answer[-1], len(each.prompt) + len(each.answer) - 1, slot, True)
        for slot, each in running.items() if each.answer
    ]  # fmt: skip
    for slot, each in running.items():
        count = min(len(each.prompt) - each.done, room - len(rows))
        last = len(each.prompt) - 1
        rows += [(each.prompt[at], at, slot, at == last) for at in range(each.done, each.done + count)]
        each.done += count
    return rows


class LlamaCpp:
    """A GGUF model in llama.cpp, by the C interface that llama-cpp-python wraps: batches and logits as in the peers."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._api, self._threads = llama_cpp, threads
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library calls it for ever
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}.")

    def run(self, config: ModelConfig, case: str) -> tuple[Run, Run]:
        """One step of `case`, and what frees its context. Sequences have caches of their own; flash attention is on."""
        sequences = 1 if case == PREFILL else TOKENS[case]
        context = self._context(sequences, CONTEXT + 256, unified=False)  # llama.cpp rounds up to 256
        memory = self._api.llama_get_memory(context)
        batch = self._api.llama_batch_init(PROMPT, 0, 1)
        self._fill(batch, [(token, i, 0, i == PROMPT - 1) for i, token in enumerate(prompt(config, PROMPT))])
        if case != PREFILL:
            self._decode(context, batch)
            for sequence in range(1, sequences):
                self._api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
            ids = prompt(config, sequences)
            self._fill(batch, [(token, CONTEXT, sequence, True) for sequence, token in enumerate(ids)])
        kept = 0 if case == PREFILL else CONTEXT

        def step() -> Any:
            for sequence in range(sequences):
                self._api.llama_memory_seq_rm(memory, sequence, kept, -1)
            self._decode(context, batch)
            return self._api.llama_get_logits_ith(context, -1)

        return step, self._closer(context, batch)

    def serve(self, requests: Sequence[Request], slots: int, context: int) -> tuple[Run, Run]:
        """What answers all requests, the tokens of each by greedy choice, and what frees its context.

        Continuous batching as in llama.cpp's server: every sequence in one of `slots`, in one cache of `context` tokens
        a slot; a batch takes the next token of all that decode, then of prompts what fits.
        """
        made = self._context(slots, context, unified=True)
        memory, batch = self._api.llama_get_memory(made), self._api.llama_batch_init(PROMPT, 0, 1)
        vocabulary = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))

        def serve() -> list[list[int]]:
            answers: list[list[int]] = [[] for _ in requests]
            waiting, running = deque(zip(requests, answers, strict=True)), dict[int, Slot]()
            while waiting or running:
                for slot in range(slots):
                    if waiting and slot not in running:
                        request, answer = waiting.popleft()
                        running[slot] = Slot(np.asarray(request.prompt).tolist(), request.max_tokens, answer)
                rows = next_rows(running, PROMPT)
                self._fill(batch, rows)
                self._decode(made, batch)
                wanted = [slot for _, _, slot, last in rows if last]
                for at, slot in enumerate(wanted):
                    logits = np.ctypeslib.as_array(self._api.llama_get_logits(made), (len(wanted), vocabulary))
                    running[slot].answer.append(int(logits[at].argmax()))
                    if len(running[slot].answer) == running[slot].most:
                        del running[slot]
                        self._api.llama_memory_seq_rm(memory, slot, -1, -1)
            return answers

        return serve, self._closer(made, batch)

    def _closer(self, context: Any, batch: Any) -> Run:
        def close() -> None:
            self._api.llama_batch_free(batch)
            self._api.llama_free(context)

        return close

    def _context(self, sequences: int, each: int, *, unified: bool) -> Any:
        """Room for `each` tokens in each of the sequences, apart or (unified) in one cache with a mask."""
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * each, sequences
        params.n_batch = params.n_ubatch = PROMPT
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified, params.no_perf = unified, True
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {sequences} sequences.")
        return context

    @staticmethod
    def _fill(batch: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, whether its logits are wanted)."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence

    def _decode(self, context: Any, batch: Any) -> None:
        code = self._api.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}.")

    def close(self) -> None:
        """Free the model."""
        self._api.llama_model_free(self._model)
