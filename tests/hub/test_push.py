"""Our own checkpoints by public name: pushed to and loaded from a stand-in of the Hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from hub_server import Repository
from parity_cases import save_vit_gpt2

import mmx
from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.data.scenes import generate_scene, render_scene
from mmx.errors import CheckpointError
from mmx.hub.pretrained import import_checkpoint, load_pretrained
from mmx.hub.push import PushOptions, push_checkpoint
from mmx.models.checkpoint import is_checkpoint, load_model, save_model
from mmx.testing import tiny_model

NAME = "anna/shapes"
FILES = {"config.yaml", "model.safetensors", "tokenizer.json", "provenance.json", "generation.yaml", "README.md"}
PROVENANCE = {"data": ["/home/anna/flickr/dataset.json", "scenes"], "step": 300, "seed": 7, "val.CIDEr": 0.41}
IMAGE = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})


class EncoderWithFile(mmx.testing.ToyEncoder):
    """Saves one file."""

    def save_files(self, folder):
        (folder / "words.txt").write_text("one two")

    def load_files(self, folder):
        self.words = (folder / "words.txt").read_text().split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    return save_model(place, tiny_model({"image": IMAGE}), PROVENANCE, GenerationConfig(max_new_tokens=5))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def image():
    return render_scene(generate_scene(0, 3))


def refused(call, code, **details):
    with pytest.raises(CheckpointError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    for key, value in details.items():
        assert caught.value.details[key] == value
    return caught.value


def front_matter(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


# ---- push, then load ---------------------------------------------------------------------------------------------


def test_a_pushed_model_loads_by_name_and_gives_equal_outputs(hub, folder, image):
    address = push_checkpoint(folder, NAME)
    assert address.startswith(f"{hub.endpoint}/{NAME}")
    repository = hub.repositories[NAME]
    assert set(repository.files()) == FILES | {".gitattributes"}
    assert len(repository.branches["main"]) == 2, "the first commit of the Hub, and one of the push"
    assert repository.files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    local = mmx.load(folder)
    loaded = mmx.load(NAME)
    assert loaded.caption(image) == local.caption(image)
    assert (loaded.generation, loaded.model.config) == (local.generation, local.model.config)
    for name, tensor in load_model(folder).state_dict().items():
        assert torch.equal(load_pretrained(NAME).model.state_dict()[name], tensor), name


def test_the_kind_of_a_model_is_known_after_one_listing(hub, folder, tmp_path, image):
    """One request for the commit, one for its files, then the files: no request for a file that does not exist."""
    push_checkpoint(folder, NAME)
    published = save_vit_gpt2(tmp_path / "published")
    files = {path.name: path.read_bytes() for path in published.iterdir()}
    hub.repositories["ben/published"] = Repository()
    hub.repositories["ben/published"].commit("main", files | {"config.yaml": b"of: another framework"})
    for name, folder_of in ((NAME, folder), ("ben/published", published)):
        hub.log.clear()
        assert mmx.load(name).caption(image) == mmx.load(folder_of).caption(image)
        listings = [line for line in hub.log if line.startswith("GET /api/")]
        missing = [line for line in hub.log if line.endswith("config.json") and name == NAME]
        assert (len(listings), missing) == (2, [])


def test_only_files_of_the_format_are_pushed_and_downloaded(hub, copy):
    (copy / "training").mkdir()
    (copy / "training" / "optimizer.safetensors").write_bytes(b"large")
    (copy / "notes.txt").write_text("private")
    (copy / "LICENSE").write_text("terms")
    push_checkpoint(copy, NAME)
    repository = hub.repositories[NAME]
    assert set(repository.files()) == FILES | {"LICENSE", ".gitattributes"}
    repository.commit("main", repository.files() | {"pytorch_model.bin": b"code", "sources/image/a.pkl": b"code"})
    hub.log.clear()
    mmx.load(NAME)
    assert not [line for line in hub.log if line.endswith((".bin", ".pkl", "LICENSE"))]


def test_files_of_encoders_are_pushed_and_stale_ones_deleted(hub, folder, tmp_path):
    model = tiny_model({"numbers": f"{__name__}:EncoderWithFile"})
    mine = save_model(tmp_path / "mine", model)
    push_checkpoint(mine, NAME)
    assert hub.repositories[NAME].files()["sources/numbers/words.txt"] == b"one two"
    assert load_pretrained(NAME).model.encoder("numbers").words == ["one", "two"]
    push_checkpoint(folder, NAME)
    assert set(hub.repositories[NAME].files()) == FILES | {".gitattributes"}
    (mine / "sources" / "numbers" / "table.pkl").write_bytes(b"")
    refused(lambda: push_checkpoint(mine, NAME), "hub.pickle")


def test_revisions(hub, folder, copy, image):
    push_checkpoint(folder, NAME)
    (copy / "generation.yaml").write_text("max_new_tokens: 2\n")
    push_checkpoint(copy, NAME, PushOptions(revision="short"))
    assert mmx.load(NAME).generation.max_new_tokens == 5
    assert mmx.load(NAME, revision="short").generation.max_new_tokens == 2
    first = hub.repositories[NAME].branches["main"][-1]
    push_checkpoint(copy, NAME)
    assert mmx.load(NAME).generation.max_new_tokens == 2
    assert mmx.Pipeline.from_pretrained(NAME, revision=first).generation.max_new_tokens == 5
    error = refused(lambda: mmx.load(NAME, revision="long"), "hub.revision", revision="long")
    assert "'long'" in str(error)


def test_a_downloaded_model_loads_without_the_hub(hub, folder, monkeypatch):
    push_checkpoint(folder, NAME)
    mmx.load(NAME)
    hub.failures[("GET", "/api/")] = 503
    mmx.load(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    mmx.load(NAME)
    refused(lambda: mmx.load("anna/other"), "hub.not_found", name="anna/other")
    refused(lambda: push_checkpoint(folder, NAME), "hub.not_found")
    assert hub.log == []


def test_methods_of_the_pipeline(hub, folder, tmp_path, image):
    model = mmx.load(folder)
    model.push_to_hub(NAME, private=True)
    assert hub.repositories[NAME].private
    loaded = mmx.Pipeline.from_pretrained(NAME)
    assert type(loaded) is mmx.Pipeline
    assert loaded.caption(image) == model.caption(image)
    loaded.push_to_hub("ben/copy")
    assert hub.repositories["ben/copy"].files().keys() == hub.repositories[NAME].files().keys()
    published = mmx.load(save_vit_gpt2(tmp_path / "published"))
    refused(lambda: published.push_to_hub("ben/published"), "hub.no_folder")
    assert "ben/published" not in hub.repositories


def test_a_checkpoint_of_the_hub_is_imported_as_it_is(hub, folder, tmp_path):
    push_checkpoint(folder, NAME)
    out = import_checkpoint(NAME, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == FILES - {"README.md"}
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not any(path.is_symlink() for path in out.iterdir())


# ---- the model card ----------------------------------------------------------------------------------------------


def test_the_generated_card_has_front_matter(hub, folder):
    push_checkpoint(folder, NAME, PushOptions(license_name="apache-2.0"))
    card = hub.repositories[NAME].files()["README.md"]
    assert front_matter(card) == {
        "license": "apache-2.0",
        "library_name": "mmx",
        "pipeline_tag": "image-to-text",
        "tags": ["mmx", "image-captioning", "visual-question-answering"],
        "datasets": ["dataset", "mmx-scenes"],
        "metrics": ["cider"],
    }
    text = card.decode()
    assert "mmx.load('anna/shapes')" in text
    assert "| val.CIDEr | 0.41 |" in text
    assert "/home/anna" not in text


def test_the_card_has_the_metrics_of_its_step_of_the_run(hub, folder, tmp_path):
    step = Path(shutil.copytree(folder, tmp_path / "run" / "steps" / "000300"))
    rows = [{"step": 300, "loss": 2.0}, {"step": 300, "val.BLEU-4": 0.25}, {"step": 600, "val.BLEU-4": 0.5}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(lines + '{"step": 300, "val')
    (tmp_path / "run" / "best").symlink_to(step)
    push_checkpoint(tmp_path / "run" / "best", NAME)
    card = hub.repositories[NAME].files()["README.md"]
    assert front_matter(card)["metrics"] == ["bleu"]
    table = [line for line in card.decode().splitlines() if line.startswith("| val")]
    assert table == ["| val.BLEU-4 | 0.25 |"]


def test_a_card_of_the_owner_is_kept_and_a_generated_one_is_replaced(hub, folder, copy):
    push_checkpoint(folder, NAME)
    (copy / "provenance.json").write_text((copy / "provenance.json").read_text().replace("0.41", "0.52"))
    push_checkpoint(copy, NAME)
    repository = hub.repositories[NAME]
    assert b"| val.CIDEr | 0.52 |" in repository.files()["README.md"]
    repository.commit("main", repository.files() | {"README.md": b"# Mine\n"})
    push_checkpoint(folder, NAME)
    assert repository.files()["README.md"] == b"# Mine\n"
    (copy / "README.md").write_text("# Of the folder\n")
    push_checkpoint(copy, NAME)
    assert repository.files()["README.md"] == b"# Of the folder\n"


# ---- what fails --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_of", "status", "code"),
    [
        (("POST", "/preupload/"), 403, "hub.unauthorized"),
        (("POST", "/info/lfs/"), 400, "hub.refused"),
        (("PUT", "/lfs/"), 400, "hub.refused"),
        (("POST", "/commit/"), 500, "hub.unavailable"),
        (("POST", "/commit/"), 412, "hub.conflict"),
    ],
)
def test_an_interrupted_push_leaves_the_old_files(hub, folder, copy, image, request_of, status, code):
    push_checkpoint(folder, NAME)
    before = dict(hub.repositories[NAME].files())
    model = load_model(copy)
    torch.nn.init.normal_(model.decoder.embedding.weight)
    changed = save_model(copy, model, {"val.CIDEr": 1.0}, GenerationConfig(max_new_tokens=2))
    hub.failures[request_of] = status
    refused(lambda: push_checkpoint(changed, NAME), code, status=status, name=NAME)
    assert hub.repositories[NAME].files() == before
    hub.failures.clear()
    assert mmx.load(NAME).caption(image) == mmx.load(folder).caption(image)
    push_checkpoint(changed, NAME)
    assert mmx.load(NAME).caption(image) == mmx.load(changed).caption(image)


def test_a_push_between_is_not_mixed_with(hub, folder, monkeypatch):
    push_checkpoint(folder, NAME)
    repository = hub.repositories[NAME]
    create_commit = huggingface_hub.HfApi.create_commit

    def after_another(api, *arguments, **options):
        repository.commit("main", repository.files() | {"generation.yaml": b"max_new_tokens: 9\n"})
        return create_commit(api, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", after_another)
    refused(lambda: push_checkpoint(folder, NAME), "hub.conflict")
    assert repository.files()["generation.yaml"] == b"max_new_tokens: 9\n"


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused(hub, folder, monkeypatch, status):
    hub.failures[("GET", "/api/")] = status
    refused(lambda: mmx.load(NAME), "hub.unauthorized", status=status)
    refused(lambda: push_checkpoint(folder, NAME), "hub.unauthorized", status=status)
    hub.failures.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    refused(lambda: push_checkpoint(folder, NAME), "hub.unauthorized", status=401)
    assert hub.repositories == {}


def test_a_repository_that_may_not_be_created(hub, folder):
    hub.failures["POST", "/api/repos/create"] = 403
    refused(lambda: push_checkpoint(folder, NAME), "hub.unauthorized", status=403)
    hub.failures["POST", "/api/repos/create"] = 500
    refused(lambda: push_checkpoint(folder, NAME), "hub.unavailable", status=500)
    assert hub.repositories == {}


def test_a_repository_of_an_organization_in_which_none_may_be_created(hub, folder):
    push_checkpoint(folder, NAME)
    hub.failures["POST", "/api/repos/create"] = 403
    push_checkpoint(folder, NAME, PushOptions(revision="next"))
    assert set(hub.repositories[NAME].branches) == {"main", "next"}


def test_a_missing_token_is_reported_before_any_request(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(lambda: push_checkpoint(folder, NAME), "hub.no_token", name=NAME)
    assert hub.log == []


def test_a_name_that_does_not_exist_and_a_hub_that_does_not_work(hub, monkeypatch):
    refused(lambda: mmx.load("anna/nothing"), "hub.not_found", status=404)
    refused(lambda: mmx.load("too/many/parts"), "hub.not_found", status=None)
    hub.failures[("GET", "/api/")] = 500
    refused(lambda: mmx.load("anna/nothing"), "hub.unavailable", status=500)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    refused(lambda: mmx.load("anna/nothing"), "hub.not_found", status=None)


def test_a_repository_without_a_model_and_one_of_another_library(hub, folder):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit("main", {"README.md": b"# Nothing yet\n"})
    refused(lambda: mmx.load(NAME), "hub.file_missing", name=NAME)
    hub.repositories["ben/published"] = Repository()
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub.repositories["ben/published"].commit("main", files)
    refused(lambda: push_checkpoint(folder, "ben/published"), "hub.not_replaceable")
    assert hub.repositories["ben/published"].files() == files


@pytest.mark.parametrize("name", ["shapes", "anna/", "/shapes", "anna/shapes/2", "anna/two words", "", 5])
def test_a_name_without_user_is_refused(hub, folder, name):
    refused(lambda: push_checkpoint(folder, name), "hub.name", name=name)
    assert hub.log == []


def test_folders_that_are_not_pushed(hub, copy, tmp_path):
    (tmp_path / "photos").mkdir()
    refused(lambda: push_checkpoint(tmp_path / "photos", NAME), "checkpoint.missing")
    refused(lambda: push_checkpoint(save_vit_gpt2(tmp_path / "theirs"), NAME), "checkpoint.published_model")
    provenance = json.loads((copy / "provenance.json").read_text())
    (copy / "provenance.json").write_text(json.dumps({**provenance, "format_version": 1}))
    refused(lambda: push_checkpoint(copy, NAME), "checkpoint.old_format")
    (copy / "provenance.json").write_text(json.dumps({**provenance, "sha256": "0"}))
    refused(lambda: push_checkpoint(copy, NAME), "checkpoint.sha256")
    assert hub.log == []


def test_a_published_model_with_a_config_yaml_is_no_checkpoint(folder, tmp_path):
    published = save_vit_gpt2(tmp_path / "published")
    (published / "config.yaml").write_text("of: another framework")
    assert not is_checkpoint(published)
    assert mmx.load(published).caption(render_scene(generate_scene(0, 3)))
