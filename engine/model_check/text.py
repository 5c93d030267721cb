"""Text: the report of a model check as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.model_check.stored_tensors import PARTS

_GIB = 1 << 30
_SHOWN = 3


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report of `report.py`."""
    what = report["model_type"] or "no model_type"
    verdict = "runs" if report["runs"] else "does not run"
    yield f"{report['folder']} ({what}): {verdict}"
    yield from (f"  - {problem}" for problem in report["problems"])
    yield from (f"  note: {remark}" for remark in report["remarks"])
    yield ""
    rows = [*_model_rows(report), *_file_rows(report), *_capacity_rows(report.get("capacity"))]
    yield from (f"{name:<11} {text}".rstrip() for name, text in rows)
    if "ranks" in report:
        yield ""
        yield from _rank_lines(report["ranks"], report["dtype"], bool(report["quantization"]))


def _model_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "family" not in report:
        return
    layers, attention = report["layers"], report["attention"]
    yield "family", report["family"]
    yield (
        "layers",
        f"{layers['moe']} MoE, {layers['dense']} dense; hidden {report['hidden']}, vocabulary "
        f"{report['vocabulary']}, context {report['context']}, rotary {report['rope']}",
    )
    if attention["kind"] == "MLA":
        latent = f"latent {attention['kv_rank']} + rotary key {attention['rope_dim']}"
        yield "attention", f"MLA: {attention['num_heads']} heads, {latent}"
    else:
        every, windowed = layers["moe"] + layers["dense"], attention["window_layers"]
        window = f", window {attention['window']}" if windowed else ""
        if 0 < windowed < every:
            window += f" in {windowed} of {every} layers"
        yield (
            "attention",
            f"GQA: {attention['num_heads']} heads, {attention['num_kv_heads']} key/value heads of "
            f"{attention['head_dim']}{window}",
        )
    if (experts := report["experts"]) is not None:
        yield "experts", _experts(experts)
    parameters = report["parameters"]
    yield (
        "parameters",
        f"{_count(parameters['total'])}, {_count(parameters['active'])} active per token",
    )


def _experts(experts: Mapping[str, Any]) -> str:
    least, most = experts["least_top_k"], experts["top_k"]
    top_k = f"top-{most}" if least == most else f"top-{least} to top-{most} by layer"
    text = f"{experts['num_experts']} routed of width {experts['ffn']}"
    if experts.get("num_zero_experts"):
        text += f" and {experts['num_zero_experts']} zero experts"
    text += f", {top_k}"
    if experts.get("num_groups", 1) > 1:
        text += f" of {experts['top_groups']} of {experts['num_groups']} groups"
    text += f", {experts['score']}" + (" + bias" if experts.get("correction_bias") else "")
    shared = experts["shared_ffn"]
    return text + (f"; shared expert of width {shared}" if shared else "; no shared expert")


def _file_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    stored, tokenizer = report["stored"], report["tokenizer"]
    yield "format", report["quantization"] or "not quantised"
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


def _capacity_rows(capacity: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if capacity is None:
        return
    factors, ranks = capacity["dropless_factor"], capacity["ranks"]
    yield (
        "capacity",
        f"token_drop: yes; drops nothing from gamma {factors['expert']:.4g} (E/K) on, in scope "
        f"rank from {factors['rank']:.4g} on {ranks} ranks",
    )
    yield "", f"expanded_drop on {ranks} ranks: {capacity['expanded_drop']}"
    yield "", f"copies of experts: {capacity['copies']}"
    yield "", f"shared expert balanced: {capacity['shared_expert']}"


def _rank_lines(
    ranks: Sequence[Mapping[str, Any]], dtype: str, is_quantised: bool
) -> Iterator[str]:
    """Yield a table: a line per number of ranks, of the rank that holds most."""
    sound = [row for row in ranks if "problem" not in row]
    title = f"per rank in {dtype}, in GiB, of the rank that holds most"
    if sound:
        title += f"; KV cache {sound[0]['kv_bytes_per_token'] / 1024:.1f} KiB per token"
    yield title
    parts = [part for part in PARTS if any(part in row["bytes"] for row in sound)]
    sizes = list(sound[0]["kv_tokens"]) if sound else []
    head = ["ranks", "local experts", *parts, "total", *(["as stored"] if is_quantised else [])]
    table = [[*head, *(f"tokens, {size} GiB" for size in sizes)]]
    for row in sound:
        few, most = row["experts"]
        sums = [row["bytes"].get(part, 0) for part in (*parts, "total")]
        sums += [row["stored_bytes"]] if is_quantised else []
        cells = [f"{row['ranks']}", f"{most}" if few == most else f"{few} or {most}"]
        cells += [f"{size / _GIB:.2f}" for size in sums]
        table.append([*cells, *(f"{n:,}" if n else "no room" for n in row["kv_tokens"].values())])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if sound else []:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    yield from (f"{row['ranks']} ranks: {row['problem']}" for row in ranks if "problem" in row)
    for size in sizes:
        fits = [row["ranks"] for row in sound if row["kv_tokens"][size]]
        found = f"fits on {', '.join(map(str, fits))}" if fits else "fits on none of these numbers"
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
