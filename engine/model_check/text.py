"""Text: the report of a model check as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.model_check.stored_tensors import PARTS

_GIB, _MIB = 1 << 30, 1 << 20
_SHOWN = 3


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report of `report.py`."""
    what = report["model_type"] or "no model_type"
    verdict = "runs" if report["runs"] else "does not run"
    yield f"{report['folder']} ({what}): {verdict}"
    yield from (f"  - {problem}" for problem in report["problems"])
    yield from (f"  note: {remark}" for remark in report["remarks"])
    yield ""
    rows = [*_model_rows(report), *_file_rows(report), *_capacity_rows(report)]
    yield from (f"{name:<11} {text}".rstrip() for name, text in rows)
    if "ranks" in report:
        yield ""
        is_plain = report["held"]["as"] in (None, "none", "dequantize")
        has_stored = bool(report["stored"]["bytes"]) and bool(
            report["quantization"] or not is_plain
        )
        experts = report["experts"]
        can_be_int4 = is_plain and experts is not None and experts["form"] == "plain SwiGLU"
        yield from _rank_lines(report["ranks"], has_stored, can_be_int4)


def _model_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "family" not in report:
        return
    layers, attention = report["layers"], report["attention"]
    yield "family", report["family"]
    built = report["implementation"]
    yield "built by", f"{built['as']} (model.implementation {built['setting']})"
    yield (
        "layers",
        f"{layers['moe']} MoE, {layers['dense']} dense; hidden {report['hidden']}, vocabulary "
        f"{report['vocabulary']}, context {report['context']}, rotary {report['rope']}",
    )
    if attention["kind"] == "MLA":
        latent = f"latent {attention['kv_rank']} + rotary key {attention['rope_dim']}"
        yield "attention", f"MLA: {attention['num_heads']} heads, {latent}"
    else:
        every, window = layers["moe"] + layers["dense"], ""
        for kind in ("window", "chunk"):
            limited = attention[f"{kind}_layers"]
            window += f", {kind} {attention[kind]}" if limited else ""
            if 0 < limited < every:
                window += f" in {limited} of {every} layers"
        yield (
            "attention",
            f"GQA: {attention['num_heads']} heads, {attention['num_kv_heads']} key/value heads of "
            f"{attention['head_dim']}{window}{', sinks' if attention.get('sinks') else ''}",
        )
    if attention["state_layers"]:
        every = layers["moe"] + layers["dense"]
        text = f"gated DeltaNet in {attention['state_layers']} of {every} layers"
        yield "", f"{text}: a recurrent state per sequence in place of keys and values"
    if (experts := report["experts"]) is not None:
        yield "experts", _experts(experts)
    yield "parameters", _parameters(report["parameters"], report["tied_embeddings"])
    parts = {name: count for name, count in report["parameters"]["parts"].items() if count}
    if parts:
        yield "", ", ".join(f"{name} {_count(count)}" for name, count in parts.items())


def _parameters(parameters: Mapping[str, Any], is_tied: bool) -> str:
    text = f"{_count(parameters['total'])}, {_count(parameters['active'])} active per token ("
    if is_tied:
        return f"{text}of the experts the top-k; the embedding is the head)"
    whole = _count(parameters["active_with_embedding"])
    return f"{text}of the experts the top-k, of the embedding one row; {whole} with all rows)"


def _experts(experts: Mapping[str, Any]) -> str:
    least, most = experts["least_top_k"], experts["top_k"]
    top_k = f"top-{most}" if least == most else f"top-{least} to top-{most} by layer"
    text = f"{experts['num_experts']} routed of width {experts['ffn']}"
    text += f" ({experts['form']})" if experts["form"] != "plain SwiGLU" else ""
    if experts.get("num_zero_experts"):
        text += f" and {experts['num_zero_experts']} zero experts"
    text += f", {top_k}"
    if experts.get("num_groups", 1) > 1:
        text += f" of {experts['top_groups']} of {experts['num_groups']} groups"
    if experts.get("external"):
        return text + ", chosen by transformers' router"
    text += f", {experts['score']}" + (
        " + correction bias" if experts.get("correction_bias") else ""
    )
    shared = experts["shared_ffn"]
    return text + (f"; shared expert of width {shared}" if shared else "; no shared expert")


def _file_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    stored, tokenizer = report["stored"], report["tokenizer"]
    yield "format", report["quantization"] or "not quantised"
    if "held" in report:
        yield "held", _held(report["held"], report["dtype"], bool(report["quantization"]))
    yield "files", f"{stored['files']}, of {_size(stored['bytes'])} in all"
    for part in (part for part in PARTS if part in stored["parts"]):
        kinds = sorted(stored["parts"][part].items(), key=lambda item: -item[1])
        yield "", f"{part}: " + ", ".join(f"{kind} {_size(size)}" for kind, size in kinds)
    if stored["ignored"]:
        yield "", f"{stored['ignored']} tensors are known and not needed, and are not read"
    if unused := stored["unused"]:
        names = "; ".join(unused[:_SHOWN]) + ("; ..." if len(unused) > _SHOWN else "")
        yield "", f"{len(unused)} tensors that nothing uses: {names}"
    template = "chat template" if tokenizer["chat_template"] else "no chat template"
    yield "tokenizer", f"{', '.join(tokenizer['files']) or 'none'}; {template}"


def _held(held: Mapping[str, str | None], dtype: str, is_quantised: bool) -> str:
    """Return how a rank holds the weights."""
    setting, name = held["setting"], held["as"]
    if name is None:
        return f"refused, see above; the sizes below are those of weights in {dtype}"
    if name == "none" and is_quantised and setting != "dequantize":  # without the files
        text = f"in {dtype}, dequantised; what could be kept as it is only the files' headers tell"
    elif name in ("none", "dequantize"):
        text = f"in {dtype}" + (", dequantised as they are read" if is_quantised else "")
    else:
        kept = (
            "as the checkpoint has them" if name == "keep" else f"in {name}, made from their values"
        )
        text = f"experts {kept}; all else in {dtype}"
    return f"{text} (model.quantization {setting})"


def _capacity_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if (capacity := report.get("capacity")) is None:
        return
    factors, ranks = capacity["dropless_factor"], capacity["ranks"]
    has_zero_experts = report["experts"]["num_zero_experts"] > 0
    of_what = "(E + Z)/K, zero experts included" if has_zero_experts else "E/K"
    yield (
        "capacity",
        f"token_drop: {capacity['token_drop']}; drops nothing from gamma "
        f"{factors['expert']:.4g} ({of_what}) on, in scope rank from {factors['rank']:.4g} on "
        f"{ranks} ranks",
    )
    yield "", f"router score: {capacity['priority']}"
    yield "", f"renormalize: {capacity['renormalize']}"
    yield "", f"expanded_drop on {ranks} ranks: {capacity['expanded_drop']}"
    yield "", f"copies of experts: {capacity['copies']}"
    yield "", f"shared expert balanced: {capacity['shared_expert']}"


def _rank_lines(
    ranks: Sequence[Mapping[str, Any]], has_stored: bool, can_be_int4: bool
) -> Iterator[str]:
    """Yield a table: a line per number of ranks, of the rank that holds most.

    Args:
        has_stored: whether to compare with the same weights as the files have them.
        can_be_int4: whether the experts can be held in fewer bytes.
    """
    sound = [row for row in ranks if "problem" not in row]
    most_bytes = max((row["bytes"]["total"] for row in sound), default=_GIB)
    unit, name = (_GIB, "GiB") if most_bytes >= _GIB else (_MIB, "MiB")
    title = f"per rank, in {name}, of the rank that holds most"
    if sound:
        title += f"; KV cache {sound[0]['kv_bytes_per_token'] / 1024:.1f} KiB per token"
        title += f" ({sound[0]['kv_fp8_bytes_per_token'] / 1024:.1f} with scheduler.kv_dtype = fp8)"
        if states := sound[0]["state_bytes_per_sequence"]:
            title += f", states {states / (1 << 20):.1f} MiB per sequence"
    yield title
    parts = [part for part in PARTS if any(part in row["bytes"] for row in sound)]
    sizes = list(sound[0]["kv_tokens"]) if sound else []
    head = ["ranks", "local experts", *parts, "total", *(["as stored"] if has_stored else [])]
    table = [[*head, *(f"tokens, {size} GiB" for size in sizes)]]
    for row in sound:
        few, most = row["experts"]
        sums = [row["bytes"].get(part, 0) for part in (*parts, "total")]
        sums += [row["stored_bytes"]] if has_stored else []
        cells = [f"{row['ranks']}", f"{most}" if few == most else f"{few} or {most}"]
        cells += [f"{size / unit:.2f}" for size in sums]
        table.append([*cells, *(f"{n:,}" if n else "no room" for n in row["kv_tokens"].values())])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if sound else []:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    yield from (f"{row['ranks']} ranks: {row['problem']}" for row in ranks if "problem" in row)
    remedy = "; try more --ranks" + (" or --quantization int4" if can_be_int4 else "")
    for size in sizes:
        fits = [row["ranks"] for row in sound if row["kv_tokens"][size]]
        found = f"fits on {', '.join(map(str, fits))}" if fits else f"fits on none of these{remedy}"
        yield f"on GPUs of {size} GiB: {found}"
    if sound:
        yield (
            "tokens: of KV cache per rank, beside the weights and the rows of MoE layers at the "
            "default scheduler.max_batch_tokens"
        )


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _size(num_bytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"
