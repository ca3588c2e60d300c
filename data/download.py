"""Download published token shards and their tokenizer from a repository on the Hugging Face hub.

    python data/download.py --variant sp1024 [--train-shards 80] [--repo OWNER/NAME] [--out data]
    python data/download.py --variant sp8192_caseops [--train-shards 80] [--out data]

All validation shards, with their byte sidecars if there are any, and the first --train-shards training shards
of the variant go to DIR/datasets/FOLDER/, where FOLDER is the published folder name (fineweb10B_sp1024), and
the tokenizer goes to DIR/tokenizers/. The second command takes repository and folder from the table EXPORTS
and checks the published totals. A file gets its final name only after its size, hash and shard header have
been checked; an existing file is kept only if it passes the same checks. Interrupted downloads resume.
DIR/datasets/FOLDER/source.json, written last, records the origin of the files.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import httpx
import numpy as np
from files import InputError, atomic_file, digest_of, escaped, exit_code, open_input, read_json, write_json
from formats import HEADER_BYTES, PUBLISHED, SHARD_MAGIC, SHARD_VERSION, Published
from tqdm import tqdm

try:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import disable_progress_bars
except ValueError as error:  # it reads numbers from the environment, such as HF_HUB_DOWNLOAD_TIMEOUT
    print(f"error: a variable HF_...: {error}", file=sys.stderr)
    sys.exit(2)

# val_bytes: bytes of each validation token
SHARD_FILE = re.compile(r"fineweb_(train|val|val_bytes)_(\d{6})\.bin")
ATTEMPTS, FIRST_PAUSE = 4, 1.0  # attempts per file, seconds before the second attempt
DEFAULT_REPO = "willdepueoai/parameter-golf"
NETWORK = re.compile(r"(?i)HF_.*|(.*_)?PROXY|SSL_CERT_.*")  # variables that steer the client
PUBLISHED_MANIFEST = {  # what is read of a repository's manifest.json
    "datasets?": [{"name?": str, "tokenizer_name?": str}],
    "tokenizers?": [{"name?": str, "model_path?": str, "vocab_path?": str}],
}


class Export(NamedTuple):
    """A published export with byte sidecars, in a repository of its own, and its known totals."""

    repo: str
    variant: str  # the folder of its shards is fineweb10B_VARIANT
    totals: Published


# By the name that --variant takes. The variant is assumed: it is from the paths in the logs of PR #1855, not
# from the repository. If it is wrong, find_folder lists those that exist. All other names are found in the
# repository's listing.
EXPORTS = {
    "sp8192_caseops": Export(
        repo="romeerp/parameter-golf-caseops-v1",
        variant="sp8192_lossless_caps_caseops_v1_reserved",
        totals=next(known for known in PUBLISHED if known.name == "sp8192 caseops"),
    ),
}


class DownloadError(RuntimeError):
    """Network failure, or downloaded content that differs from the repository's listing. Exit code 1."""


def unusable(error: Exception) -> InputError:
    """Return the error of a client that cannot be set up; names the variables, whose values may be secret."""
    given = ", ".join(name for name in sorted(os.environ) if NETWORK.fullmatch(name) and os.environ[name])
    return InputError(f"no connection can be made with {given or '--repo and --revision'}: {error}")


# ------------------------------------------------------------------------------------------------------------
# Repository
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteFile:
    """A file in the repository's listing; small files have a git blob id (SHA-1) instead of a SHA-256."""

    path: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def folder(self) -> str:
        return PurePosixPath(self.path).parent.as_posix()


class Hub:
    """One Hugging Face repository at one commit; reads HF_ENDPOINT and HF_TOKEN from the environment.

    Raises InputError if the repository or the revision does not exist, or if a proxy, token or endpoint
    cannot be used; DownloadError if the hub does not respond, or responds with something else.
    """

    def __init__(self, repo: str, repo_type: str, revision: str | None) -> None:
        self.repo, self.repo_type = repo, repo_type
        self._endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        try:
            api = HfApi(endpoint=self._endpoint)
            self.commit: str = api.repo_info(repo, repo_type=repo_type, revision=revision).sha
            entries = list(
                api.list_repo_tree(repo, recursive=True, repo_type=repo_type, revision=self.commit)
            )
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{repo_type} {repo}, revision {revision or 'default'}: not found ({reason})"
            ) from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, ImportError) as error:
            raise unusable(error) from error
        except (httpx.HTTPError, OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(
                f"{repo}: the hub does not respond as it should ({error}). Check the connection and repeat."
            ) from error
        except ValueError as error:  # a proxy of unknown kind, a token that is not ASCII
            raise unusable(error) from error
        self.files = [
            RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        ]

    def fetch(self, file: RemoteFile, staging: Path, restart: bool) -> Path:
        """Download a file below `staging`, resuming an earlier attempt unless `restart`; return its path."""
        return Path(
            hf_hub_download(
                self.repo,
                file.path,
                repo_type=self.repo_type,
                revision=self.commit,
                local_dir=staging,
                force_download=restart,
                endpoint=self._endpoint,
            )
        )


# ------------------------------------------------------------------------------------------------------------
# File selection
# ------------------------------------------------------------------------------------------------------------


def find_folder(files: Iterable[RemoteFile], variant: str, prefix: str) -> str:
    """Return the repository's folder of a variant's shards: `fineweb10B_sp1024` is variant `sp1024`.

    Raises InputError if no folder or more than one matches; the message lists the variants that exist.
    """
    start = f"{prefix.strip('/')}/".lstrip("/")
    folders = sorted(
        {file.folder for file in files if SHARD_FILE.fullmatch(file.name) and file.path.startswith(start)}
    )
    names = {folder: PurePosixPath(folder).name for folder in folders}
    labels = {folder: name.split("_", 1)[-1] for folder, name in names.items()}
    matching = [folder for folder in folders if variant in (labels[folder], names[folder])]
    if len(matching) > 1:
        raise InputError(
            f'variant "{variant}" is in several folders: {", ".join(matching)}. Choose one with --prefix.'
        )
    if not matching:
        available = ", ".join(sorted(set(labels.values()))) or "none"
        raise InputError(f'no variant "{variant}"; available: {available}')
    return matching[0]


def folder_variant(options: argparse.Namespace) -> str:
    """Return the variant as the repository names it."""
    return EXPORTS[options.variant].variant if options.variant in EXPORTS else options.variant


def choose_shards(files: Iterable[RemoteFile], folder: str, train_shards: int) -> list[RemoteFile]:
    """Return all validation files of a folder, then its first `train_shards` training shards.

    Byte sidecars follow the validation shards. Raises InputError if there are fewer training shards, no
    validation shards, or sidecars that do not match these one to one.
    """
    kinds: dict[str, list[RemoteFile]] = {"train": [], "val": [], "val_bytes": []}
    for file in sorted(files, key=lambda file: file.path):
        if file.folder == folder and (match := SHARD_FILE.fullmatch(file.name)):
            kinds[match[1]].append(file)
    if train_shards > len(kinds["train"]):
        raise InputError(f"--train-shards {train_shards}: {folder} has {len(kinds['train'])} training shards")
    if not kinds["val"]:
        raise InputError(f"{folder} has no validation shards")
    if kinds["val_bytes"]:
        shards, sidecars = ({file.name: file.size for file in kinds[kind]} for kind in ("val", "val_bytes"))
        shards = {name.replace("val_", "val_bytes_"): size for name, size in shards.items()}
        for name in sorted(shards.keys() | sidecars.keys()):
            if shards.get(name) != sidecars.get(name):
                raise InputError(
                    f"{folder}/{name}: {sidecars.get(name, 'no')} bytes, but its validation shard has "
                    f"{shards.get(name, 'no')}; a byte sidecar has one entry per token"
                )
    return kinds["val"] + kinds["val_bytes"] + kinds["train"][:train_shards]


def _kind(shard: RemoteFile) -> str:
    return SHARD_FILE.fullmatch(shard.name)[1]


def nearest(files: Iterable[RemoteFile], folder: str, pattern: str) -> list[RemoteFile]:
    """Return the files that match a relative path pattern in the nearest parent of `folder` that has any."""
    for parent in PurePosixPath(folder).parents:
        start = "" if parent.as_posix() == "." else f"{parent.as_posix()}/"
        found = [
            file
            for file in files
            if file.path.startswith(start) and re.fullmatch(pattern, file.path.removeprefix(start))
        ]
        if found:
            return found
    return []


def choose_tokenizer(files: list[RemoteFile], folder: str, manifest: dict) -> list[RemoteFile]:
    """Return the tokenizer files: those the published manifest names, else those with the variant's size."""
    candidates = nearest(files, folder, r"tokenizers/[^/]+")
    name = PurePosixPath(folder).name
    specs = {entry.get("name"): entry for entry in manifest.get("tokenizers") or []}
    spec = specs.get(published_entry(manifest, name).get("tokenizer_name"), {})
    named = {PurePosixPath(spec[key]).name for key in ("model_path", "vocab_path") if spec.get(key)}
    listed = [file for file in candidates if file.name in named]
    number = re.search(r"\d+", name.split("_", 1)[-1])
    numbered = [file for file in candidates if number and re.search(rf"(?<!\d){number[0]}(?!\d)", file.name)]
    return listed or numbered or candidates


def published_entry(manifest: dict, name: str) -> dict:
    """Return the entry of a dataset in a published manifest, or an empty object."""
    return next((entry for entry in manifest.get("datasets") or [] if entry.get("name") == name), {})


# ------------------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------------------


def shard_tokens(path: Path) -> int:
    """Return the number of tokens in a shard. DownloadError if its header or size is wrong."""
    with open_input(path) as stream:
        header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise DownloadError(f"{path.name}: {len(header)} bytes, shorter than a shard header")
    magic, version, tokens = struct.unpack("<3i", header[:12])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise DownloadError(
            f"{path.name}: magic {magic}, version {version}, not {SHARD_MAGIC}, {SHARD_VERSION}: not a shard"
        )
    size = path.stat().st_size
    if size != HEADER_BYTES + 2 * tokens:
        raise DownloadError(
            f"{path.name}: {size} bytes, but {tokens} tokens need {HEADER_BYTES + 2 * tokens}"
        )
    return tokens


def check_content(path: Path, file: RemoteFile, sha256: str) -> None:
    """Compare a file of known SHA-256 with the listing. DownloadError if size, hash or header differ."""
    size = path.stat().st_size
    if size != file.size:
        raise DownloadError(f"{file.path}: {size} bytes, the repository lists {file.size}")
    if file.sha256 and sha256 != file.sha256:
        raise DownloadError(f"{file.path}: SHA-256 {sha256}, the repository lists {file.sha256}")
    if not file.sha256:
        blob_id = digest_of(path, "sha1", f"blob {size}\0".encode())
        if blob_id != file.blob_id:
            raise DownloadError(f"{file.path}: git blob {blob_id}, the repository lists {file.blob_id}")
    if SHARD_FILE.fullmatch(path.name):
        shard_tokens(path)


def check_listing(
    export: Export, repo: str, folder: str, chosen: Iterable[RemoteFile], tokenizer: list[RemoteFile]
) -> None:
    """Check a known export by the repository's listing, before anything is downloaded.

    Raises InputError if sidecar or tokenizer are missing, or if the validation shards have other tokens.
    """
    files = list(chosen)
    if not tokenizer:
        raise InputError(f"{repo}: no tokenizer beside {folder}")
    if not any(_kind(file) == "val_bytes" for file in files):
        raise InputError(f"{repo}: no fineweb_val_bytes_000000.bin in {folder}; bits per byte need it")
    tokens = sum((file.size - HEADER_BYTES) // 2 for file in files if _kind(file) == "val")
    if tokens != export.totals.tokens:
        raise InputError(
            f"{repo}: {tokens} validation tokens in {folder}, the published export has "
            f"{export.totals.tokens}. Exports with fewer validation documents may train on the others. "
            f"Choose another --revision, or skip the check with --repo {repo} --variant {export.variant}."
        )


def sidecar_bytes(paths: Iterable[Path]) -> int | None:
    """Return the sum of all byte sidecars among local files, or None if there are none."""
    sidecars = [path for path in paths if re.fullmatch(r"fineweb_val_bytes_\d{6}\.bin", path.name)]
    sums = [np.fromfile(path, "<u2", offset=HEADER_BYTES).sum(dtype=np.int64) for path in sidecars]
    return int(sum(sums)) if sidecars else None


class HashCache:
    """SHA-256 of local files by size, modification time and path, kept in a JSON file."""

    def __init__(self, path: Path, trusted: bool) -> None:
        self._path = path
        self._entries: dict[str, str] = {}
        if trusted:
            with suppress(InputError):  # a broken cache only costs time
                self._entries = read_json(path, {str: str})

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file; read it only if it is new or changed."""
        status = path.stat()
        key = f"{status.st_size} {status.st_mtime_ns} {path.resolve().as_posix()}"
        self._entries[key] = self._entries.get(key) or digest_of(path)
        return self._entries[key]

    def save(self) -> None:
        """Write the cached hashes."""
        write_json(self._path, self._entries)


# ------------------------------------------------------------------------------------------------------------
# Download
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Destinations of the selected files, split into existing files and files to download."""

    folder: str
    shards_at: Path
    kept: dict[Path, RemoteFile]
    missing: dict[Path, RemoteFile]

    @property
    def missing_bytes(self) -> int:
        return sum(file.size for file in self.missing.values())


def make_plan(hub: Hub, options: argparse.Namespace, manifest: dict, cache: HashCache) -> Plan:
    """Select the files and check which of them already exist.

    Raises InputError if the folder holds shards of another repository: the trainer would read them too.
    """
    folder = find_folder(hub.files, folder_variant(options), options.prefix)
    shards_at = options.out / "datasets" / PurePosixPath(folder).name
    chosen = choose_shards(hub.files, folder, options.train_shards)
    tokenizer = choose_tokenizer(hub.files, folder, manifest)
    if options.variant in EXPORTS:
        check_listing(EXPORTS[options.variant], hub.repo, folder, chosen, tokenizer)
    wanted = {shards_at / file.name: file for file in chosen}
    wanted |= {options.out / "tokenizers" / file.name: file for file in tokenizer}
    kept = {path: file for path, file in wanted.items() if is_intact(path, file, cache)}
    listed = {file.name: file for file in hub.files if file.folder == folder}
    for path in sorted(shards_at.glob("fineweb_*.bin")):
        if path in wanted:
            continue
        if path.name not in listed or not is_intact(path, listed[path.name], cache):
            raise InputError(
                f"{path}: not a file of {hub.repo} at {hub.commit[:12]}. Move it or choose another --out."
            )
        kept[path] = listed[path.name]
    return Plan(folder, shards_at, kept, {path: file for path, file in wanted.items() if path not in kept})


def is_intact(path: Path, file: RemoteFile, cache: HashCache) -> bool:
    """Return whether a local file exists and matches the listing."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    try:
        check_content(path, file, cache.sha256(path))
    except DownloadError:
        return False
    return True


def fetch_checked(hub: Hub, file: RemoteFile, staging: Path) -> Path:
    """Download and check a file; return its path below `staging`. DownloadError after ATTEMPTS failures."""
    restart, failure = False, ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            path = hub.fetch(file, staging, restart)
            check_content(path, file, digest_of(path))
            return path
        except (DownloadError, httpx.HTTPError, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            # Resume after a lost connection; restart after wrong content or a range that the server refuses.
            status = getattr(getattr(error, "response", None), "status_code", None)
            restart = status == 416 or not isinstance(error, httpx.HTTPError)
            failure = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    (staging / file.path).unlink(missing_ok=True)
    raise DownloadError(f"{file.path}: {failure} ({ATTEMPTS} attempts). Run the command again to resume.")


def fetch_all(hub: Hub, plan: Plan, staging: Path, workers: int, cache: HashCache) -> None:
    """Download the missing files in parallel; rename each to its final name after its check."""
    _check_space(staging, plan.missing_bytes)
    for folder in {path.parent for path in plan.missing}:  # may be a link to another disk
        _check_space(folder, sum(file.size for path, file in plan.missing.items() if path.parent == folder))
    progress = tqdm(desc="downloading", total=plan.missing_bytes, unit="B", unit_scale=True, disable=None)
    with progress, ThreadPoolExecutor(workers) as pool:
        futures = {
            pool.submit(fetch_checked, hub, file, staging): (path, file)
            for path, file in plan.missing.items()
        }
        try:
            for future in as_completed(futures):
                path, file = futures[future]
                move(future.result(), path)
                cache.sha256(path)
                cache.save()
                progress.update(file.size)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def move(source: Path, target: Path) -> None:
    """Rename a file, or copy it if the target is on another disk; it gets its final name when complete."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with source.open("rb") as content, atomic_file(target) as copy:
            shutil.copyfileobj(content, copy, 1 << 20)
        source.unlink()


def _check_space(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder}: not enough disk space: {needed:,} bytes to download, {free:,} bytes free"
        )


def read_manifest(hub: Hub, options: argparse.Namespace) -> dict:
    """Return the repository's manifest of the variant at this commit, or an empty object."""
    folder = find_folder(hub.files, folder_variant(options), options.prefix)
    found = nearest(hub.files, folder, r"manifest\.json")
    if not found:
        return {}
    with tempfile.TemporaryDirectory() as staging:
        return read_json(fetch_checked(hub, found[0], Path(staging)), PUBLISHED_MANIFEST)


def source_record(
    hub: Hub, plan: Plan, options: argparse.Namespace, manifest: dict, cache: HashCache
) -> dict:
    """Return the content of source.json: origin, size and hash of every file, bytes of validation targets.

    Raises DownloadError if the bytes are not those of the known export.
    """
    files, val_bytes = [], sidecar_bytes([*plan.kept, *plan.missing])
    if options.variant in EXPORTS and val_bytes != EXPORTS[options.variant].totals.num_bytes:
        raise DownloadError(
            f"{plan.folder}: the validation tokens stand for {val_bytes} bytes by their sidecars, the "
            f"published export has {EXPORTS[options.variant].totals.num_bytes}. These are other data."
        )
    for path, file in sorted((plan.kept | plan.missing).items()):
        tokens = shard_tokens(path) if SHARD_FILE.fullmatch(path.name) else None
        local = path.relative_to(options.out).as_posix()
        files.append(
            {
                "file": local,
                "path": file.path,
                "size": file.size,
                "sha256": cache.sha256(path),
                "tokens": tokens,
            }
        )
    return {
        "repo": hub.repo,
        "repo_type": hub.repo_type,
        "revision": hub.commit,
        "variant": options.variant,
        "files": files,
        **({} if val_bytes is None else {"val_target_bytes": val_bytes}),
        "published": published_entry(manifest, PurePosixPath(plan.folder).name) or None,
    }


def kept_overlap(source: Path, record: dict) -> dict:
    """Return the entry of prepare.py --overlap in `source` if the files are still those of `record`."""
    with suppress(InputError):
        before = read_json(source, {"files": list, "overlap": dict})
        return {"overlap": before["overlap"]} if before["files"] == record["files"] else {}
    return {}


def download(options: argparse.Namespace) -> str:
    """Run the download, or the dry run, and return one line that summarizes it."""
    hub = Hub(options.repo, options.repo_type, options.revision)
    work = options.out / ".download"
    cache = HashCache(work / "hashes.json", trusted=not options.verify)
    manifest = read_manifest(hub, options)
    plan = make_plan(hub, options, manifest, cache)
    origin = escaped(f"{hub.repo} at {hub.commit[:12]}, {plan.folder}")
    summary = f"{origin}: {len(plan.kept)} files kept, {len(plan.missing)} files, "
    if options.dry_run:
        lines = [f"{file.size:>13,}  {escaped(str(path))}" for path, file in plan.missing.items()]
        return "\n".join([*lines, f"{summary}{plan.missing_bytes:,} bytes to download"])
    source = plan.shards_at / "source.json"
    if plan.missing:
        source.unlink(missing_ok=True)
        fetch_all(hub, plan, work / "staging", options.workers, cache)
    shutil.rmtree(work / "staging", ignore_errors=True)
    record = source_record(hub, plan, options, manifest, cache)
    write_json(source, record | kept_overlap(source, record))
    cache.save()
    if not any("tokenizers" in path.parts for path in (*plan.kept, *plan.missing)):
        print(f"warning: {hub.repo} has no tokenizer beside {plan.folder}", file=sys.stderr)
    return f"{summary}{plan.missing_bytes:,} bytes downloaded"


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Download published token shards and their tokenizer.")
    parser.add_argument(
        "--variant", required=True, metavar="NAME", help=f"for example sp1024 or {', '.join(EXPORTS)}"
    )
    parser.add_argument(
        "--repo",
        metavar="OWNER/NAME",
        help=f"hub repository (default: the variant's own, else {DEFAULT_REPO})",
    )
    parser.add_argument(
        "--repo-type", choices=("dataset", "model"), default="dataset", help="default: dataset"
    )
    parser.add_argument("--prefix", default="", metavar="FOLDER", help="search only this repository folder")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: the main branch)")
    parser.add_argument(
        "--train-shards", type=int, default=80, metavar="N", help="first N shards (default: 80)"
    )
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="default: data")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="parallel downloads (default: 8)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be downloaded and stop")
    parser.add_argument("--verify", action="store_true", help="rehash existing files, ignoring the cache")
    options = parser.parse_args(arguments)
    if options.train_shards < 0 or options.workers < 1:
        parser.error("--train-shards must be at least 0 and --workers at least 1")
    if options.repo is None:
        options.repo = EXPORTS[options.variant].repo if options.variant in EXPORTS else DEFAULT_REPO
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a failure, 2 for a user error."""
    options = parse_arguments(arguments)
    disable_progress_bars()  # our own bar shows the total
    return exit_code(lambda: print(download(options)), DownloadError)


if __name__ == "__main__":
    sys.exit(main())
