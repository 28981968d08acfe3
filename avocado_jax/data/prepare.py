"""Convert a manifest and its clips to shards: clips are read once, checked, measured and written as ArrayRecord files.

The first run on a folder stores the set of rows to prepare in `parts/job.json`. This set is a generation. The shards
depend only on these rows, so several machines can write them, and an interrupted run writes only the missing ones. For
each finished shard, a report in parts/ lists its content. Finishing merges the reports into the index, and writes
manifest.json last. The next run starts another generation with appended rows, retried rejects, and the rows of lost
shards. It writes new shards after the existing ones. If the manifest was edited in between, records with unchanged
lines are kept. While the folder has too many rejects, each run retries all of them.

Memory of the main process: 44 bytes per manifest line, about 150 bytes per record when finishing, and the rejects.
Temporary space (TMPDIR): a copy of the manifest unless it is a local file, and with parts the clips of (workers + 1)
shards. Workers write their shards in OUT/parts, or in TMPDIR if OUT is remote.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from avocado_jax.data import storage
from avocado_jax.data.generation import (
    NO_CLIP,
    Base,
    Folder,
    contained,
    keep_unchanged,
    load_base,
    open_generation,
    other_job,
)
from avocado_jax.data.index import FORMAT, dump_index
from avocado_jax.data.make_shard import MEASURED, Job, json_line, run_tasks
from avocado_jax.data.manifest import Lines, Reject, hash_name, scan_manifest
from avocado_jax.data.media import reading_fields
from avocado_jax.data.media_sources import CLIPS, Source, open_source, spool
from avocado_jax.data.records import VERSION
from avocado_jax.data.shard_tasks import line_shards, line_tasks, part_name, part_tasks, parts_read, shard_name
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

T = TypeVar("T")


class Prepared(NamedTuple):
    """The result of a job."""

    records: int
    shards: int
    bytes: int
    rejects: list[Reject]
    complete: bool  # False: too many rejects, the folder is not usable
    warnings: Sequence[str] = ()  # warnings about accepted clips; only from the run that completes the folder
    unused: int = 0  # clips without a row, if they are listed


def prepare(
    job: Job, workers: int, max_reject_share: float = 0.05, shard: tuple[int, int] | None = None, finish: bool = False
) -> Prepared | None:
    """Run or resume a job in `workers` processes.

    If more than `max_reject_share` of the rows are rejected, the folder is not completed. A second run, with a larger
    share or with corrected rows, prepares only the rejected rows.

    Args:
        shard: (I, N): write the shards of machine I (from 0) of N, do not finish, and return None.
        finish: write no shards; merge the shards of all machines.

    Raises:
        InputError: the source cannot be read or is empty, `out` belongs to another job, or shards are missing for
            `finish`.
        StorageError: storage failed, or the disk is full. Finished shards are kept.
        BrokenProcessPool: a process was killed. Finished shards are kept.
    """
    folder = Folder(job.out)
    words = asdict(job)["words"]
    prompts = [job.prompts] if job.prompts else []
    key = _sum([FORMAT, VERSION, job.features, job.shard_records, reading_fields(job.reading), words, *prompts])
    base = load_base(folder, key)
    opened = folder.read("parts/job.json") if "parts/job.json" in folder.files else None
    if opened is not None and opened.get("job") != key:
        raise other_job(job.out)
    if opened is not None and opened["generation"] != base.doc["generation"] + 1:
        if shard is None:  # the generation was finished before the run was interrupted; with shards others may use it
            _clean(folder, base, opened if base.complete else None)
            folder.refresh()
        opened = None
    source = open_source(job.source, job.media)
    with tempfile.TemporaryDirectory() as temporary:
        manifest = spool(source, Path(temporary)) if source.manifests else None
        lines, base = _scan(job, source, manifest, base, opened)
        if opened is None:
            opened = open_generation(folder, source, lines, base, key)
            work = opened["parts"] if source.parts else opened["rows"]
            if finish:
                if base.complete:
                    return _result(base)
                if base.doc["generation"] < 0:
                    raise InputError(f"{job.out}: nothing is prepared; run prepare without --finish first")
                opened |= {"rows": [], "parts": [], "lost": []}  # finish again with another share of rejects
            elif base.complete and not work and not opened["lost"] and opened["md5"] == base.doc["md5"]:
                return _result(base) if shard is None else None
            if not finish:
                storage.write(folder.path("parts/job.json"), json_line(opened).encode())
        if not finish:
            machine, machines = shard or (0, 1)
            if source.parts:
                clips = Path(temporary, "clips")
                clips.mkdir()
                tasks = part_tasks(folder, opened, source, lines, manifest, job, machine, machines, clips)
            else:
                tasks = line_tasks(folder, opened, lines, manifest, job, machine, machines)
            for name in progress(run_tasks(job, source, tasks, workers), f"prepare {job.out}: shards"):
                folder.made.add(name)
    if shard is not None:
        return None
    return _finish(folder, job, key, source, lines, base, opened, max_reject_share)


def _scan(
    job: Job, source: Source, manifest: Path | None, base: Base, opened: dict[str, Any] | None
) -> tuple[Lines, Base]:
    """Check the manifest. It must start with what the open generation reads. Also returns the kept part of `base`."""
    if manifest is None:
        empty = np.zeros(0, np.int64)
        return Lines(empty, empty, empty, empty, empty, [], 0, {0: ""}), base
    limit = opened["size"] if opened else None
    with storage.local_errors(str(manifest)), manifest.open("rb") as file:
        lines = scan_manifest(file, source.key, limit, [base.doc["size"]])
    if not len(lines.number) and not lines.rejects:
        raise InputError(f"{job.source}: has no lines")
    if not len(lines.number):  # before the folder belongs to this manifest
        first = lines.rejects[0]
        table = job.source.endswith((".csv", ".tsv"))
        raise InputError(
            f'{job.source}: no line is {{"id": "a", "video": "a.mp4", "caption": "A man ..."}}; '
            f"line {first.line}: {first.reason}" + "; avocado_jax/data/README.md converts a CSV" * table
        )

    def edited(earlier: dict[str, Any]) -> bool:
        return "md5" in earlier and lines.prefix_md5.get(earlier["size"]) != earlier["md5"]

    if opened and edited(opened):
        raise other_job(job.out)
    return lines, keep_unchanged(base, lines, source, job.out) if edited(base.doc) else base


def _finish(
    folder: Folder,
    job: Job,
    key: str,
    source: Source,
    lines: Lines,
    base: Base,
    opened: dict[str, Any],
    max_reject_share: float,
) -> Prepared:
    """Merge a generation into the index; write manifest.json, or parts/manifest.json if there are too many rejects."""
    folder.refresh()
    generation, todo = opened["generation"], contained(lines.number, opened["rows"])
    names, ends = _expected(folder, job, source, opened, int(todo.sum()))
    reports = _parallel(folder.read, [folder.report_of(name) for name in names])
    ends = _parallel(folder.read, ends)

    # Records of the remaining shards, then the new ones. Of records with equal lines or ids, the first is indexed.
    kept = [number for number, shard in enumerate(base.doc["shards"]) if shard["file"] not in opened["lost"]]
    new_number = np.full(len(base.doc["shards"]), -1, np.int64)
    new_number[kept] = np.arange(len(kept))
    shards = [base.doc["shards"][number] for number in kept]
    stays = np.flatnonzero(new_number[base.columns["shard"]] >= 0) if base.ids else np.zeros(0, np.int64)
    ids = [base.ids[row] for row in stays.tolist()]
    columns = {name: [base.columns[name][stays]] for name in ("line", *MEASURED, "position") if base.ids}
    columns = columns or {name: [] for name in ("line", *MEASURED, "position")}
    columns["shard"] = [new_number[base.columns["shard"][stays]]] if base.ids else []
    taken = set(ids)
    unused = [clip for clip in base.unused if clip["part"] not in {part for part, _ in opened["parts"]}]
    rejects, warnings = list(lines.rejects), []
    damaged = {end["part"] for end in ends if end["damage"]}
    for report in reports:
        again = {"retry": True} if report["part"] in damaged else {}  # the clips of a damaged part may be wrong
        rejects += [Reject(*reject)._replace(**again) for reject in report["rejects"]]
        warnings += report["warnings"]
        new = report["columns"]
        fresh = []
        for row, name in enumerate(new["id"]):
            if name not in taken:
                taken.add(name)
                fresh.append(row)
            elif source.rows_inside:
                reason = "its id is that of an earlier clip"
                rejects.append(Reject(new["line"][row], name, None, reason, part=report["part"]))
            else:
                unused.append({"part": report["part"], "clip": f"{name} (a second copy)"})
        if new["id"]:
            ids += [new["id"][row] for row in fresh]
            for name in ("line", *MEASURED):
                columns[name].append(np.array(new[name])[fresh])
            columns["position"].append(np.array(fresh, np.int32))
            columns["shard"].append(np.full(len(fresh), len(shards), np.int32))
            shards.append(
                {name: report[name] for name in ("file", "part", "bytes", "md5")} | {"records": len(new["id"])}
            )
    table = {name: np.concatenate(column) if column else np.zeros(0, np.int32) for name, column in columns.items()}

    if not source.rows_inside:
        table["content"] = lines.content[np.searchsorted(lines.number, table["line"])]

    # Earlier rejects that were not retried, then the new ones.
    rejects += _earlier_rejects(source, lines, todo, base, opened)
    rejects += [Reject(0, None, end["part"], end["damage"], True, end["part"]) for end in ends if end["damage"]]
    if source.parts and not source.rows_inside:
        settled = np.concatenate([table["line"], np.array([reject.line for reject in rejects], int)])
        rejects += [Reject(line, None, None, NO_CLIP, True) for line in np.setdiff1d(lines.number, settled).tolist()]
    rejects.sort(key=lambda reject: (reject.part, reject.line) if source.rows_inside else (reject.line, reject.part))
    unused += [{"part": end["part"], "clip": clip} for end in ends for clip in end["unused"]]
    if source.listed and not source.parts:
        unused = _clips_without_row(source, lines)
    data = dump_index(ids, table)
    doc = {
        "version": FORMAT,
        "job": key,
        "generation": generation,
        "size": opened["size"],
        "md5": opened["md5"],
        "media": base.doc["media"] | {end["part"]: end["bytes"] for end in ends},
        "records": len(ids),
        "rejected": len(rejects),
        "unused": len(unused),
        "features": job.features,
        "text_unit": "token" if job.words else "byte",
        "reading": reading_fields(job.reading),
        "index": f"index-{generation:05d}.npz",
        "index_md5": hashlib.md5(data, usedforsecurity=False).hexdigest(),
        "shards": shards,
    }
    complete = len(rejects) <= max_reject_share * (len(ids) + len(rejects))
    done = Base(doc, ids, table, rejects, unused, complete)
    same = {name: base.doc.get(name) for name in ("generation", "index")}
    if not (base.complete and doc | same == base.doc and rejects == base.rejects and unused == base.unused):
        storage.write(folder.path(doc["index"]), data)
        storage.write(folder.path("rejects.jsonl"), _json_lines(reject._asdict() for reject in rejects))
        if source.parts or source.listed:
            storage.write(folder.path("unused.jsonl"), _json_lines(unused))
        where = "manifest.json" if complete else "parts/manifest.json"
        storage.write(folder.path(where), (json.dumps(doc, indent=1) + "\n").encode())
        if complete:
            base = done
    _clean(folder, base if complete else done, opened if complete else None)
    return _result(done, warnings)


def _expected(
    folder: Folder, job: Job, source: Source, opened: dict[str, Any], count: int
) -> tuple[list[str], list[str]]:
    """The names of a generation's shards, and the report files of its parts.

    Raises:
        InputError: some shards are missing.
    """
    if not source.parts:
        names, ends = line_shards(opened, count, job), []
    else:
        names, ends, read = [], [], parts_read(folder)
        for number, (part, _) in enumerate(opened["parts"]):
            if part_name(opened, number) not in read:
                raise InputError(f"{folder.out}: part {part} is not prepared; run prepare without --finish first")
            end, shards = read[part_name(opened, number)]
            ends.append(end)
            names += [shard_name(opened["generation"], number, shard) for shard in range(shards)]
    if missing := [name for name in names if folder.report_of(name) is None]:
        some = f"{len(missing)} of {len(names)} shards are not made, {missing[0]} for one"
        raise InputError(f"{folder.out}: {some}; run prepare without --finish first")
    return names, ends


def _earlier_rejects(source: Source, lines: Lines, todo: Any, base: Base, opened: dict[str, Any]) -> list[Reject]:
    """Rejects of earlier generations that this one has not retried."""
    if source.rows_inside:
        skipped = dict(opened["parts"])
        return [
            reject
            for reject in base.rejects
            if reject.part not in skipped
            or (reject.line and contained(np.array([reject.line]), skipped[reject.part])[0])
        ]
    good = set(lines.number[~todo].tolist())
    return [reject for reject in base.rejects if reject.line in good and reject.reason != NO_CLIP]


def _clips_without_row(source: Source, lines: Lines) -> list[dict[str, str]]:
    names = source.dataset.sizes if source.dataset else [entry.name for entry in storage.listing(source.base)]
    clips = [name for name in names if name.lower().endswith(CLIPS)]
    keys = np.array([hash_name(source.key(name)) for name in clips], np.uint64)
    return [{"part": "", "clip": clips[row]} for row in np.flatnonzero(~np.isin(keys, lines.video)).tolist()]


def _clean(folder: Folder, base: Base, finished: dict[str, Any] | None) -> None:
    """Remove merged files; in a complete folder all of parts/, lost shards and earlier indexes.

    parts/job.json is removed last, so that the next run completes an interrupted cleanup.
    """
    gone = {name for name in folder.files if name.startswith("parts/") or name.endswith(".part")}
    if finished is None:
        gone.discard("parts/manifest.json")
    else:
        gone |= {name for name in folder.files if name.startswith("index-") and name != base.doc["index"]}
        gone.update(finished["lost"])
    _parallel(lambda name: storage.delete(folder.path(name)), sorted(gone - {"parts/job.json"}))
    storage.delete(folder.path("parts/job.json"))
    if finished is not None and not storage.is_remote(folder.out):
        shutil.rmtree(folder.path("parts"), ignore_errors=True)


def _parallel(call: Callable[[str], T], names: Iterable[str]) -> list[T]:
    with ThreadPoolExecutor(storage.REQUESTS) as pool:
        return list(pool.map(call, names))


def _result(base: Base, warnings: Sequence[str] = ()) -> Prepared:
    shards = base.doc["shards"]
    size = sum(shard["bytes"] for shard in shards)
    return Prepared(len(base.ids), len(shards), size, base.rejects, base.complete, warnings, len(base.unused))


def _json_lines(values: Iterable[dict[str, Any]]) -> bytes:
    return "".join(map(json_line, values)).encode()


def _sum(value: Any) -> str:
    return hashlib.md5(json.dumps(value).encode(), usedforsecurity=False).hexdigest()
