"""CHAIR by hand: mentions, plurals and phrases, objects of references and of COCO instances."""

import json

import pytest

from mmx.errors import DataError
from mmx.evaluation.chair import ObjectWords, chair, read_instances, read_objects
from mmx.evaluation.joining import ScoredText

WORDS = ObjectWords(
    {
        "person": ["person", "people", "woman", "child"],
        "dog": ["dog", "puppy"],
        "hot dog": ["hot dog"],
        "bus": ["bus"],
        "knife": ["knife"],
        "tv": ["tv", "television set"],
    }
)


def text(number, prediction, *targets):
    return ScoredText(number, number, str(number), None, prediction, targets, {"image": f"images/{number}.jpg"})


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Two women and a PUPPY.", ["person", "dog"]),
        ("puppies, dogs; a dog's bus, buses", ["dog", "dog", "dog", "bus", "bus"]),
        ("a hot dog and hot dogs", ["hot dog", "hot dog"]),
        ("a hot, sunny dog", ["dog"]),
        ("people with knives", ["person", "knife"]),
        ("television sets", ["tv"]),
        ("dogma, a boat", []),
        ("", []),
    ],
)
def test_mentions(sentence, expected):
    assert WORDS.find(sentence) == expected


def test_objects_that_no_reference_names_are_hallucinated():
    texts = [
        text(0, "a dog and a bus", "a puppy sleeps", "a bus stop"),
        text(1, "a woman eats a hot dog next to a dog", "people eating", "food"),
        text(2, "a field", "a child in a field"),
        ScoredText(3, 3, "3", "what?", "a knife", ("a dog",), {}),
    ]
    wrong_mentions, wrong_captions = chair(texts, WORDS).metrics
    assert (wrong_mentions.name, wrong_mentions.value) == ("CHAIRi", 2 / 5)
    assert (wrong_captions.name, wrong_captions.value) == ("CHAIRs", 1 / 3)


def write_instances(path, names=("person", "dog"), **changes):
    document = {
        "categories": [{"id": 10 + n, "name": name} for n, name in enumerate(names)],
        "images": [{"id": 77, "file_name": "0.jpg"}, {"id": 1, "file_name": "other.jpg"}],
        "annotations": [{"image_id": 77, "category_id": 11}, {"image_id": 1, "category_id": 10}],
    }
    path.write_text(json.dumps(document | changes))
    return path


def test_objects_of_instances_are_found_by_file_name_or_image_id(tmp_path):
    instances = read_instances(write_instances(tmp_path / "instances.json"), WORDS)
    texts = [text(0, "a dog and a person", "a bus"), text(1, "a dog and a person", "a bus"), text(2, "a dog", "a dog")]
    scores = chair(texts, WORDS, instances)
    assert [metric.value for metric in scores.metrics] == [2 / 4, 1]
    assert scores.metrics[0].examples.tolist() == [0, 1]
    assert len(scores.problems) == 1 and "2" in scores.problems[0]
    with pytest.raises(DataError) as caught:
        chair(texts[2:], WORDS, instances)
    assert caught.value.code == "chair.no_caption"


def test_instances_need_categories_that_are_objects(tmp_path):
    with pytest.raises(DataError) as caught:
        read_instances(write_instances(tmp_path / "a.json", names=("person", "sofa")), WORDS)
    assert (caught.value.code, caught.value.details["name"]) == ("data.category", "sofa")
    annotations = [{"image_id": 1, "category_id": 99}]
    with pytest.raises(DataError) as caught:
        read_instances(write_instances(tmp_path / "b.json", annotations=annotations), WORDS)
    assert caught.value.code == "data.category"


def test_files_of_objects(tmp_path):
    path = tmp_path / "objects.txt"
    path.write_text("person, man, people\n\ntraffic light, stoplight\n", encoding="utf-8")
    words = read_objects(path)
    assert words.names == {"person", "traffic light"}
    assert words.find("men and people at stoplights") == ["person", "person", "traffic light"]
    for content, code in (("", "data.objects"), ("a,,b", "data.objects"), ("a, b\na, c", "data.objects")):
        path.write_text(content)
        with pytest.raises(DataError) as caught:
            read_objects(path)
        assert caught.value.code == code
    with pytest.raises(DataError) as caught:
        read_objects(tmp_path / "none.txt")
    assert caught.value.code == "data.missing"
