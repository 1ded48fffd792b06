"""Writing to the hub, left out of trials: the functions that do return what a script goes on with."""

import concurrent.futures
import inspect
import sys
from collections.abc import Callable
from typing import Any

import huggingface_hub
import huggingface_hub.hf_api
import transformers.utils.hub

from ds_tune.objectives.rank.script.replaced import silence

WRITES = (
    "accept_", "add_", "batch_", "cancel_", "change_", "comment_", "copy_", "create_", "delete_", "disable_",
    "duplicate_", "edit_", "enable_", "grant_", "hide_", "merge_", "move_", "pause_", "permanently_", "preupload_",
    "reject_", "rename_", "request_", "restart_", "resume_", "run_job", "run_uv_job", "scale_", "set_", "super_squash_",
    "suspend_", "trigger_", "unlike", "update_", "upload_",
)  # fmt: skip
"""Beginnings of the names of the hub's methods that write."""

COMMITS = ("create_commit", "upload_file", "upload_folder", "delete_file", "delete_files", "delete_folder")

NOBODY = "user"
"""Owner of a repository that was named without one; only the hub knows whose token it is."""


def leave_out_uploads() -> None:
    """Called before the script begins, when the libraries have been imported."""
    instead: dict[int, Callable[..., Any]] = {}
    for name, method in list(vars(huggingface_hub.HfApi).items()):
        if name.startswith(WRITES) and callable(method):
            answer = _answering(name, inspect.signature(method))
            setattr(huggingface_hub.HfApi, name, answer)
            # Each method is a function of the package as well, which others have imported by now.
            if (function := getattr(huggingface_hub.hf_api, name, None)) is not None:
                instead[id(function)] = answer
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("huggingface_hub", "transformers", "accelerate", "datasets")):
            for name, value in list(vars(module).items()):
                if (found := instead.get(id(value))) is not None:
                    setattr(module, name, found.__get__(huggingface_hub.hf_api.api))
    for name, function in vars(huggingface_hub.hf_api).items():
        if name.startswith(WRITES) and inspect.ismethod(function):
            setattr(huggingface_hub, name, function)  # its own are imported when they are first asked for
    silence(transformers.utils.hub.PushToHubMixin, "push_to_hub")


def _answering(name: str, signature: inspect.Signature) -> Callable[..., Any]:
    """A method that sends nothing."""

    def method(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        answer = _answer(name, str(given.get("repo_id", "")), given)
        if not given.get("run_as_future"):
            return answer
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(answer)
        return future

    method.__name__ = name
    return method


def _answer(name: str, repository: str, given: dict[str, Any]) -> Any:
    """What the hub would have said, as far as a script goes on with it."""
    owned = repository if "/" in repository else f"{NOBODY}/{repository}"
    kinds = {"dataset": "datasets/", "space": "spaces/"}
    url = f"https://huggingface.co/{kinds.get(str(given.get('repo_type')), '')}{owned}"
    if name == "create_repo":
        return huggingface_hub.RepoUrl(url, endpoint="https://huggingface.co")
    if name in COMMITS:
        message = str(given.get("commit_message") or "")
        return huggingface_hub.CommitInfo(
            commit_url=f"{url}/commit/{'0' * 40}", commit_message=message, commit_description="", oid="0" * 40
        )
    return None
