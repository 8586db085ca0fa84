"""The hub's own client beside `strata pull`, in one cache (HF_HOME): what it finds of a model, or what it downloads from HF_ENDPOINT.

usage: python hub.py find OWNER/NAME        prints, as JSON, what is there of it without asking the hub
       python hub.py download OWNER/NAME    prints the folder that it has downloaded it to
"""
import json
import sys

from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache


def find(model):
    cache = scan_cache_dir()
    repos = [repo for repo in cache.repos if repo.repo_id == model]
    print(json.dumps({
        "warnings": [str(warning) for warning in cache.warnings],
        "revisions": [
            {"commit": revision.commit_hash, "refs": sorted(revision.refs), "files": sorted(f.file_name for f in revision.files)}
            for repo in repos for revision in repo.revisions
        ],
        "snapshot": snapshot_download(model, local_files_only=True),
        "config": try_to_load_from_cache(model, "config.json"),
    }))


if __name__ == "__main__":
    what, model = sys.argv[1:]
    find(model) if what == "find" else print(snapshot_download(model))
