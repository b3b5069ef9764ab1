"""Our kernels and every peer on the same tensors in one process, in turn, after a check against float64.

    python benchmarks/kernels.py

Writes kernels.json to results/<gpu>: one row a section and case, with the median, p20 and p80 of every candidate, its
error, memory and share of the ceilings measured in the same run. Times are the GPU's alone; `cpu_ms` is what a call
takes the CPU, which decides where it is the longer one. A candidate that cannot run is an entry with its
reason; what would start after --seconds is left out, and listed. --only takes globs over "section/case", such as
"softmax/*"; sections: linear, softmax, norm-rope, training, graph, fla, fla-training, causal-step, causal,
causal-training. The last five are slow to start (fla-core searches its configurations at first call), so they come
last; give them runs of their own with --only "fla*" --name kernels_fla --seconds 500, and
--only "causal*" --name kernels_causal --seconds 500.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import cases
import torch
from candidates import Candidate
from report import environment, gpu_name, results_folder, write_json
from sections_causal import CausalSection, CausalStepSection, CausalTrainingSection
from sections_linear import FlaSection, FlaTrainingSection, GraphSection, LinearSection, TrainingSection
from sections_softmax import NormRopeSection, SoftmaxSection
from timing import Deadline, ceilings, chosen, digits, interleave, peak_bytes, reason


def sections() -> Iterator[tuple[str, object, list]]:
    """In the order of their worth, should time run out."""
    trained = [case for case in cases.LINEAR if case.train]
    yield "linear", LinearSection(), cases.LINEAR
    yield "softmax", SoftmaxSection(), cases.SOFTMAX
    yield "norm-rope", NormRopeSection(), cases.NORM_ROPE
    yield "training", TrainingSection(), trained
    yield "graph", GraphSection(), [case for case in cases.LINEAR if case.graph]
    yield "fla", FlaSection(), trained
    yield "fla-training", FlaTrainingSection(), trained
    yield "causal-step", CausalStepSection(), cases.CAUSAL_STEP
    yield "causal", CausalSection(), cases.CAUSAL
    yield "causal-training", CausalTrainingSection(), [case for case in cases.CAUSAL if case.train]


def prepare(section, case, candidate: Candidate, inputs) -> tuple[dict, Callable, dict[str, Callable]]:
    """Build one candidate, call it, check it: its entry so far, its call, and more calls of it to time."""
    start = time.perf_counter()
    function, tensors = candidate.build(*inputs)
    call = section.call(case, function, tensors)
    call()
    torch.cuda.synchronize()
    entry: dict = {"first_call_s": digits(time.perf_counter() - start, 3), "ours": candidate.ours}
    if candidate.low_precision:
        entry["low_precision"] = True
    if candidate.same:
        entry["error"] = section.error(case, function, tensors, inputs, candidate.options)
        if not entry["error"] <= candidate.limit:
            entry["wrong"] = f"the error may be {candidate.limit} at most"
    else:
        entry["wrong"] = "another function, not compared"
    entry["peak_bytes"] = peak_bytes(call)
    return entry, call, section.more_calls(case, function, tensors)


def measure(section, case, ceiling: dict, deadline: Deadline) -> dict:
    """One row: every candidate of a case."""
    torch._dynamo.reset()  # each case compiles for its own shapes, and is not counted against the limit of another
    inputs = section.inputs(case)
    entries, calls = {}, {}
    for name, candidate in section.candidates(case).items():
        if candidate.slow and not case.every_peer:
            continue
        if deadline.passed and not candidate.ours:
            entries[name] = {"left_out": "no time"}
            continue
        try:
            entries[name], calls[name], more = prepare(section, case, candidate, inputs)
            calls |= {f"{name}/{kind}": call for kind, call in more.items()}
        except Exception as error:
            entries[name] = {"failed": reason(error)}
    for name, times in together(calls).items():
        if "failed" in times:
            entries[name.split("/")[0]] |= times
            continue
        if name in entries:
            entry = entries[name]
            entry |= times | section.measured(case, times["median"], entry.pop("peak_bytes"), ceiling)
        else:
            name, kind = name.split("/")
            entries[name][f"{kind}_ms"] = digits(times["median"] / section.copies)
    return {"floor_ms": section.floor_ms(case, ceiling), "candidates": entries} | comparison(entries)


def together(calls: dict[str, Callable]) -> dict[str, dict]:
    """The times of all in turn; if one of them fails there, of each alone."""
    try:
        return interleave(calls, queued=True) if calls else {}
    except Exception:
        times = {}
        for name, call in calls.items():
            try:
                times |= interleave({name: call}, queued=True)
            except Exception as error:
                times[name] = {"failed": reason(error)}
        return times


def comparison(entries: dict[str, dict]) -> dict:
    """How the first of ours compares with the best of the others, where both compute the same."""
    skipped = ("wrong", "low_precision")
    timed = {name: e["median"] for name, e in entries.items() if "median" in e and not any(s in e for s in skipped)}
    others = {name: milli for name, milli in timed.items() if not entries[name].get("ours")}
    if "ours" not in timed or not others:
        return {}
    best = min(others, key=others.get)
    return {"best_peer": best, "speedup_over_best_peer": digits(others[best] / timed["ours"], 3)}


def line(row: dict) -> str:
    if "candidates" not in row:
        return f"{row['section']}/{row['case']}: {row['failed']}"
    cells = []
    for name, entry in row["candidates"].items():
        value = f"{entry['median']:.4g}" if "median" in entry else "-"
        value += " WRONG" if entry.get("ours") and "wrong" in entry else ""
        in_a_row = f" (in a row {entry['in_a_row_ms']:.4g})" if "in_a_row_ms" in entry else ""
        cells.append(f"{name} {value}{in_a_row}")
    of_floor = row["candidates"].get("ours", {}).get("of_floor")
    head = f"{row['section']}/{row['case']}: floor {row['floor_ms']:.4g}" + (f", ours {of_floor}x" if of_floor else "")
    return f"{head} | {' | '.join(cells)}"


def run(out: Path, name: str = "kernels", only: list[str] | None = None, seconds: float = 170) -> dict:
    """Run the sections, writing the file after every row. Returns its content."""
    deadline = Deadline(seconds)
    warnings.simplefilter("ignore")  # torch tells at length which kernel takes which call; the reason is in the row
    rows: list[dict] = []
    left_out: list[str] = []
    content = {"environment": environment(), "dtype": "bfloat16", "ceilings": ceilings(), "only": only, "rows": rows}
    content["left_out"] = left_out
    print(content["ceilings"], flush=True)
    for title, section, section_cases in sections():
        for case in section_cases:
            if not chosen(f"{title}/{case.name}", only):
                continue
            if deadline.passed:
                left_out.append(f"{title}/{case.name}")
                continue
            row = {"section": title, "case": case.name, "shape": asdict(case)}
            try:
                with torch.set_grad_enabled(section.training):
                    row |= measure(section, case, content["ceilings"], deadline)
            except Exception as error:
                row["failed"] = reason(error)
            rows.append(row)
            print(line(row), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            write_json(out / f"{name}.json", content | {"seconds": round(deadline.elapsed, 1)})
    content |= {"ceilings_after": ceilings(), "seconds": round(deadline.elapsed, 1)}
    write_json(out / f"{name}.json", content)
    if left_out:
        print(f"left out after {seconds:.0f} s: {', '.join(left_out)}", flush=True)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result; results/<gpu> if not given")
    parser.add_argument("--name", default="kernels", help="of the result, without .json")
    parser.add_argument("--only", action="append", help='glob over "section/case"; may be repeated')
    parser.add_argument("--seconds", type=float, default=170, help="start nothing after this long")
    args = parser.parse_args()
    if not any(chosen(f"{title}/{case.name}", args.only) for title, _, section in sections() for case in section):
        parser.error(f"--only: {args.only} matches no case")
    out = args.out or results_folder(gpu_name())
    run(out, args.name, args.only, args.seconds)


if __name__ == "__main__":
    main()
