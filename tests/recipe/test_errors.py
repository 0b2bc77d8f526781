"""Wrong input of every kind: the line, the key, the value, and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from armor_recipes.errors import RecipeError
from armor_recipes.recipe import load_recipe, load_recipe_mapping
from tests.support.recipes import REGISTRY, VALID, errors, load, write

HEAD = "model: m\noutput: {path: o}\n"
STAGE = "a_stage:\n  a_modifiers:\n    QuantizationModifier: {targets: [x]}\n"
PRUNE = "prune_stage.armor_modifiers.ARMORModifier"
AT = "prune_stage: {{armor_modifiers: {{ARMORModifier: {{{}}}}}}}"
CALIBRATED = HEAD + "calibration: {dataset: d}\n"

FIELDS = [
    # line 4 of a recipe that is otherwise right, the key in the message, and what the message says
    (
        "targets: [x], block_size: '128'",
        "block_size",
        "must be a whole number or a list or 'auto' (value '128'); remove the quotes",
    ),
    ("targets: [x], block_size: true", "block_size", "must be a whole number or a list or 'auto' (value true)"),
    ("targets: [x], block_size: 1.5", "block_size", "must be a whole number or a list or 'auto' (value 1.5)"),
    ("targets: [x], block_size: [1, a]", "block_size.1", "must be a whole number (value 'a')"),
    ("targets: [x], block_size: [1]", "block_size.1", "required, but missing"),
    ("targets: [x], block_size: [1, 2, 3]", "block_size", "is too long: at most 2"),
    ("targets: [x], block_size: autos", "block_size", "nearest value: auto"),
    ("targets: [x], block_size: {a: 1}", "block_size", "(value {'a': 1})"),
    ("targets: [x], block_sise: 1", "block_sise", "unknown key; nearest valid key: block_size"),
    (
        "targets: [x], zzz: 1",
        "zzz",
        "unknown key; valid keys: targets, ignore, skip_layers, optional, unfit, calibration, seed, block_size",
    ),
    ("targets: [x], solver: exat", "solver", "must be 'exact' or 'adam' (value 'exat'); nearest value: exact"),
    ("targets: [x], tolerance: -1e-4", "tolerance", "must be at least 0.0 (value -1e-4)"),
    ("targets: [x], tolerance: '1'", "tolerance", "must be a number (value '1'); remove the quotes"),
    ("targets: [x], tolerance: .nan", "tolerance", "'.nan' is not a usable number"),
    ("targets: [x], tolerance: -.inf", "tolerance", "'-.inf' is not a usable number"),
    ("targets: [x], tolerance: 1e999", "tolerance", "'1e999' is not a usable number"),
    ("targets: [x], optional: 1", "optional", "must be true or false (value 1)"),
    ("targets: [x], optional: 'true'", "optional", "must be true or false (value 'true'); remove the quotes"),
    ("targets: [x], seed: -1", "seed", "must be at least 0 (value -1)"),
    ("targets: [x], seed: 9223372036854775808", "seed", "must be less than 9223372036854775808"),
    ("targets: [x], seed: 99999999999999999999999", "seed", "is not a usable whole number"),
    ("targets: [x], seed: null", "seed", "must be a whole number (value null)"),
    ("targets: []", "targets", "must not be empty (value [])"),
    ("targets: ['']", "targets.0", "must not be empty (value '')"),
    ("targets: [x, on]", "targets.1", "must be text (value on); to mean the text, quote it: 'on'"),
    ("targets: [2]", "targets.0", "must be text (value 2); to mean the text, quote it: '2'"),
    ("targets: {a: b}", "targets", "must be a list (value {'a': 'b'})"),
    ("targets: ['re:(']", "targets.0", "is not a regular expression"),
    ("targets: ['re:a{99999999999}']", "targets.0", "is not a regular expression"),
    ("targets: [x], ignore: [[y]]", "ignore.0", "must be text (value ['y'])"),
    ("", "targets", "required, but missing; name the modules to change"),
    ("targets: [x], calibration: 3", "calibration", "must be a mapping (value 3)"),
    ("targets: [x], calibration: {samples: 0}", "calibration.samples", "must be at least 1 (value 0)"),
    (
        "targets: [x], calibration: {samples: {at_most: 2, at_mst: 3}}",
        "calibration.samples.at_mst",
        "nearest valid key: at_most",
    ),
    ("targets: [x], calibration: {samples: {at_most: x}}", "calibration.samples.at_most", "must be a whole number"),
    ("targets: [x], calibration: {dataset: []}", "calibration.dataset", "must not be empty"),
    ("targets: [x], calibration: {dataset: ''}", "calibration.dataset", "must not be empty"),
    ("targets: [x], calibration: {dataset: 3}", "calibration.dataset", "must be text or a list (value 3)"),
    ("targets: [x], calibration: {dataset: [{weight: 1}]}", "calibration.dataset.0.dataset", "required, but missing"),
    (
        "targets: [x], calibration: {dataset: [{dataset: a, weight: 0}]}",
        "calibration.dataset.0.weight",
        "must be greater than 0.0 (value 0)",
    ),
    ("targets: [x], calibration: {sequence_length: 1}", "calibration.sequence_length", "must be at least 2"),
    ("targets: [x], calibration: {batch_size: 0}", "calibration.batch_size", "must be at least 1"),
    ("targets: [x], calibration: {text_column: no}", "calibration.text_column", "quote it: 'no'"),
    ("targets: [x], calibration: {messages_column: []}", "calibration.messages_column", "must be text"),
]


@pytest.mark.parametrize(("fields", "key", "text"), FIELDS)
def test_wrong_fields_of_a_modifier(tmp_path: Path, fields: str, key: str, text: str) -> None:
    found = errors(tmp_path, CALIBRATED + AT.format(fields))
    matching = [line for line in found if line.startswith(f"recipe.yaml:4: {PRUNE}.{key}: ")]
    assert len(matching) == 1, found
    assert text in matching[0]
    assert len(found) == 1, found


SECTIONS = [
    ("model: m", "model: 3", "1: model.id: must be text (value 3); to mean the text, quote it: '3'"),
    ("model: m", "model: {}", "1: model.id: required, but missing; add `id: NAME`"),
    ("model: m", "model: [a]", "1: model: must be a mapping (value ['a'])"),
    ("model: m", "model: null", "1: model: must be a mapping (value null)"),
    ("model: m", "model: m\nmodle: m", "2: modle: unknown key; nearest valid keys: model, moe"),
    ("model: m", "model: {id: m, dtype: bfloat}", "1: model.dtype: must be 'auto', 'bfloat16', 'float16' or 'float32'"),
    ("model: m", "model: {id: m, compute_dtype: int8}", "1: model.compute_dtype: must be 'auto'"),
    ("model: m", "model: {id: m, revison: x}", "1: model.revison: unknown key; nearest valid key: revision"),
    (
        "model: m",
        "model: {id: m, trust_remote_code: true}",
        "1: model.trust_remote_code: is refused: it would run Python",
    ),
    ("output: {path: o}", "output: o", "2: output: must be a mapping (value 'o')"),
    (
        "output: {path: o}",
        "output: {path: o, format: dnse}",
        "2: output.format: must be 'compressed-tensors' or 'dense'",
    ),
    (
        "output: {path: o}",
        "output: {format: dense}",
        "2: output.path: required, but missing; add `path: FOLDER` or give --output",
    ),
    ("output: {path: o}", "output: {path: ''}", "2: output.path: must not be empty"),
    ("output: {path: o}", "", "1: output: required, but missing; add `output: {path: FOLDER}` or give --output FOLDER"),
    ("model: m", "", "2: model: required, but missing; add `model: NAME`"),
    (
        "a_stage:",
        "calibration: {}\na_stage:",
        "3: calibration.dataset: required, but missing; name the text to calibrate on",
    ),
    (
        "a_stage:",
        "calibration: {dataset: d, sample: 1}\na_stage:",
        "3: calibration.sample: unknown key; nearest valid key: samples",
    ),
    ("a_stage:", "evaluation: {}\na_stage:", "3: evaluation: names nothing to measure"),
    ("a_stage:", "evaluation: {perplexity: {}}\na_stage:", "3: evaluation.perplexity.dataset: required, but missing"),
    (
        "a_stage:",
        "evaluation: {perplexity: {dataset: d, windows: 0}}\na_stage:",
        "3: evaluation.perplexity.windows: must be at least 1",
    ),
    (
        "a_stage:",
        "evaluation: {perplexity: {dataset: [d]}}\na_stage:",
        "3: evaluation.perplexity.dataset: must be text",
    ),
    (
        "a_stage:",
        "foo: 1\na_stage:",
        "3: foo: unknown key; valid keys: metadata, model, calibration, output, evaluation, serve, moe, extends, "
        "remove, vars, NAME_stage",
    ),
    (
        "a_stage:",
        "args: {a: 1}\na_stage:",
        "3: args: unknown key, which llm-compressor would drop in silence; write the values",
    ),
    ("a_stage:", "recipe_args: {}\na_stage:", "3: recipe_args: unknown key, which llm-compressor would drop"),
    ("a_stage:", "q_modifiers: {}\na_stage:", "3: q_modifiers: a group of modifiers stands inside a stage"),
    (
        "a_stage:",
        "modifiers: {}\na_stage:",
        "3: modifiers: a group of modifiers stands inside a stage: write `default_stage",
    ),
    ("a_stage:", "b_stage: null\na_stage:", "3: b_stage: must be a mapping of groups"),
    ("a_stage:", "b_stage: {}\na_stage:", "3: b_stage: must be a mapping of groups"),
    ("a_stage:", "b_stage: {c_modifiers: {}}\na_stage:", "3: b_stage.c_modifiers: must be a mapping from modifiers"),
    ("a_stage:", "b_stage: {c_modifiers: 3}\na_stage:", "3: b_stage.c_modifiers: must be a mapping from modifiers"),
    ("a_stage:", "b_stage: {c_modifiers: [3]}\na_stage:", "3: b_stage.c_modifiers.0: must be a mapping with one key"),
    ("  a_modifiers:", "  a_modifers:", "4: a_stage.a_modifers: unknown key; nearest valid key: a_modifiers"),
    ("  a_modifiers:", "  modifiers:", "4: a_stage.modifiers: unknown key; nearest valid key: default_modifiers"),
    ("  a_modifiers:", "  foo:", "4: a_stage.foo: unknown key; valid keys: NAME_modifiers"),
    (
        "  a_modifiers:",
        "  run_type: train\n  a_modifiers:",
        "4: a_stage.run_type: llm-compressor trains in such a stage, and nothing here does",
    ),
    ("a_stage:", "a_stag:", "3: a_stag: unknown key; nearest valid key: a_stage"),
    ("a_stage:", "prune:", "3: prune: unknown key; nearest valid key: prune_stage"),
    (
        "    Quant",
        "    Qant",
        "5: a_stage.a_modifiers.QantizationModifier: unknown modifier 'QantizationModifier'; nearest registered",
    ),
    (
        "QuantizationModifier:",
        "Foo:",
        "unknown modifier 'Foo'; registered modifiers: ARMORModifier, QuantizationModifier",
    ),
    ("Modifier:", "Modifier@a.b:", "the name after @ is 'a.b'; it takes letters"),
    ("Modifier:", "Modifier@:", "the name after @ is ''; it takes letters"),
    ("{targets: [x]}", "", "5: a_stage.a_modifiers.QuantizationModifier.targets: required, but missing"),
    (
        "{targets: [x]}",
        "3",
        "5: a_stage.a_modifiers.QuantizationModifier: must be a mapping of the modifier's fields (value 3)",
    ),
    (
        "{targets: [x]}",
        "{targets: [x], scheme: W1}",
        "QuantizationModifier: scheme W1 does not exist; use W8A16 (value",
    ),
    (
        "QuantizationModifier: {",
        "ARMORModifier: {",
        "5: a_stage.a_modifiers.ARMORModifier.calibration: required, but missing",
    ),
]


@pytest.mark.parametrize(("old", "new", "text"), SECTIONS)
def test_wrong_sections_stages_and_groups(tmp_path: Path, old: str, new: str, text: str) -> None:
    whole = HEAD + STAGE
    assert old in whole
    found = errors(tmp_path, whole.replace(old, new, 1))
    assert len(found) == 1, found
    assert found[0].startswith("recipe.yaml:")
    assert text in found[0]


SYNTAX: list[tuple[str | bytes, str]] = [
    ("", "recipe.yaml:1: the recipe is empty; write keys such as `model:`"),
    ("# only a comment\n", "recipe.yaml:1: the recipe is empty"),
    ("---\n", "recipe.yaml:2: the recipe is empty"),
    ("- a\n", "recipe.yaml:1: the recipe does not hold a mapping"),
    ("text", "recipe.yaml:1: the recipe does not hold a mapping"),
    (HEAD + "a: [1,\n", "recipe.yaml:4: not valid YAML: while parsing a flow node"),
    (HEAD + "a: {b: c: d}\n", "recipe.yaml:3: not valid YAML"),
    (HEAD + "\ta: 1\n", "recipe.yaml:3: not valid YAML"),
    (HEAD + "a: *b\n", "recipe.yaml:3: not valid YAML: found undefined alias 'b'"),
    (HEAD + "---\n" + HEAD, "recipe.yaml:3: not valid YAML: a second document begins here"),
    (HEAD + "a: \x01\n", "recipe.yaml:3: not valid YAML: the character '\\x01' is not allowed"),
    (HEAD + 'a: "\\UFFFFFFFF"\n', "recipe.yaml:1: not valid YAML"),
    (HEAD + 'a: "\\ud800"\n', "recipe.yaml:3: a: a NUL character or half a surrogate pair is not text"),
    (HEAD + 'a: "\\0"\n', "recipe.yaml:3: a: a NUL character"),
    (
        HEAD + "a: !!python/object/apply:os.system [ls]\n",
        "recipe.yaml:3: a: the YAML tag '!!python/object/apply:os.system' is",
    ),
    (HEAD + "a: !own {}\n", "recipe.yaml:3: a: the YAML tag '!own' is refused"),
    (HEAD + "a: !!int x\n", "recipe.yaml:3: a: 'x' is not a usable whole number"),
    (HEAD + "a: !!bool x\n", "recipe.yaml:3: a: 'x' is not a usable boolean"),
    (HEAD + "a: !!binary aGk=\n", "recipe.yaml:3: a: the YAML tag '!!binary' is refused"),
    (HEAD + "a: &x [*x]\n", "recipe.yaml:3: a.0: an alias stands inside the value that it repeats"),
    (HEAD + "<<: 3\n", "recipe.yaml:3: a merge key (<<) takes a mapping"),
    (HEAD + "on: 3\n", "recipe.yaml:3: a key must be text, and this is on, which YAML does not read as text; quote it"),
    (HEAD + "[a]: 3\n", "recipe.yaml:3: a key must be text"),
    (HEAD + "model: x\n", "recipe.yaml:3: model: the key is already given at recipe.yaml:1; keep one of the two"),
    (HEAD + "a: " + "[" * 5000 + "\n", "recipe.yaml:3: not valid YAML: nested deeper than 64 levels"),
    (HEAD + "a:\n" + "".join(" " * i + "a:\n" for i in range(1, 200)), "not valid YAML: nested deeper than 64 levels"),
    (HEAD + "a: [" + "1," * 20_000 + "]\n", "recipe.yaml:3: not valid YAML: more than 10,000 values"),
    (HEAD.encode() + b"a: \xff\n", "recipe.yaml:3: not UTF-8 text; save the recipe as UTF-8"),
    (HEAD.encode("utf-16"), "recipe.yaml:1: not UTF-8 text"),
    ("#" * 1_000_001, "recipe.yaml: larger than 1,000,000 bytes"),
]


@pytest.mark.parametrize(("text", "message"), SYNTAX, ids=range(len(SYNTAX)))
def test_wrong_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    found = errors(tmp_path, text)
    assert any(message in line for line in found), found


def test_aliases_that_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    found = errors(tmp_path, "\n".join(lines))
    assert any("aliases expand to more than 10,000 values" in line for line in found)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert load(tmp_path, VALID.encode("utf-8-sig")).model.id == "builtin:stdlib-llama"


def test_all_errors_at_once_sorted_by_line(tmp_path: Path) -> None:
    text = "a_stage:\n  a_modifiers:\n    QuantizationModifier: {scheme: 3}\n    Foo:\nmodel: 4\nfoo: .nan\nmodel: m\n"
    found = errors(tmp_path, text)
    assert [line.split(": ")[0] for line in found] == [f"recipe.yaml:{n}" for n in (1, 3, 3, 4, 5, 6, 6, 7)]


def test_an_error_of_the_default_calibration_is_shown_once(tmp_path: Path) -> None:
    text = HEAD + "calibration: {samples: x, sead: 1}\n" + AT.format("targets: [x]")
    assert [line.split(": ")[1] for line in errors(tmp_path, text)] == [
        "calibration.dataset",
        "calibration.samples",
        "calibration.sead",
    ]


def test_two_of_one_name_in_a_list(tmp_path: Path) -> None:
    text = (
        HEAD
        + "a_stage:\n  a_modifiers:\n"
        + "".join(f"    - QuantizationModifier{name}: {{targets: [x]}}\n" for name in ("", "@2", ""))
    )
    assert errors(tmp_path, text) == [
        "recipe.yaml:7: a_stage.a_modifiers.QuantizationModifier@2: a second modifier of this name in the group; "
        "name them apart: `Kind@name`"
    ]


def test_a_recipe_without_modifiers(tmp_path: Path) -> None:
    (line,) = errors(tmp_path, HEAD)
    assert "the recipe has no modifier; add" in line


OVERRIDES = [
    ("calibration.samples", "write --set a.b.c=value"),
    ("=3", "write --set a.b.c=value"),
    ("calibration..samples=3", "write --set a.b.c=value"),
    ("extends=x.yaml", "`extends` cannot be set"),
    (".".join("a" * 40) + "=1", "nor more than 32 keys deep"),
    ("calibration.samples=[", "not valid YAML"),
    ("calibration.samples=x", "calibration.samples: must be a whole number or a mapping (value 'x')"),
    ("calibration.samples.a=3", "calibration.samples.a: cannot be set: calibration.samples is the value 16 (at"),
    ("prune_stage.armor_modifiers.ARMORModifier.targets.0=x", "targets is a list (at"),
    ("samples=3", "samples: unknown key; it stands further in, as calibration.samples"),
    ("calibraton.samples=3", "calibraton: unknown key; nearest valid keys: calibration"),
    ("a=1\nb: 2", "not valid YAML"),
    ("a={b: 1, b: 2}", "the key is already given"),
    ("model=!!python/name:os.system x", "the YAML tag"),
    ("model.id=\udc80", "not allowed"),
]


@pytest.mark.parametrize(("override", "text"), OVERRIDES)
def test_wrong_overrides(tmp_path: Path, override: str, text: str) -> None:
    found = errors(tmp_path, overrides=[override])
    assert all(line.startswith("--set ") for line in found), found
    assert any(text in line for line in found), found
    "\n".join(found).encode()


def test_wrong_flags_are_shown_as_flags(tmp_path: Path) -> None:
    assert errors(tmp_path, output="") == ["--output: output.path: must not be empty (value '')"]
    assert (
        "--output x: output.path: cannot be set: output is the value 'o'"
        in errors(tmp_path, (HEAD + STAGE).replace("{path: o}", "o"), output="x")[0]
    )


def _missing(folder: Path) -> Path:
    return folder / "nothing.yaml"


def _folder(folder: Path) -> Path:
    return folder


def _unreadable(folder: Path) -> Path:
    path = write(folder, VALID, "secret.yaml")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    return path


def _nul(folder: Path) -> Path:
    return folder / "a\0b"


def _too_long(folder: Path) -> Path:
    return folder / ("a" * 5000)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_missing, "no such file"),
        (_folder, "is a folder; name the recipe file in it"),
        (_unreadable, "permission denied"),
        (_nul, "no such file"),
        (_too_long, "cannot be read: File name too long"),
    ],
)
def test_paths_that_are_no_recipe(tmp_path: Path, make: Callable[[Path], Path], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        load_recipe([make(tmp_path)], registry=REGISTRY)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("quikstart", "no such file, and no built-in recipe has this name; nearest built-in recipe: quickstart"),
        ("zzz", "built-in recipes: quickstart, smollm2"),
        ("quickstart.yaml", "the built-in recipe of this name is called 'quickstart', without a suffix"),
    ],
)
def test_unknown_builtin_names(tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for builtin in ("quickstart.yaml", "smollm2.yaml"):
        write(tmp_path / "builtin", VALID, builtin)
    with pytest.raises(RecipeError, match=text):
        load_recipe([name], registry=REGISTRY, builtin_dir=tmp_path / "builtin")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("frist.yaml", "no such file; nearest in its folder: first.yaml$"),
        ("./frist.yml", "no such file; nearest in its folder: first.yaml; check the path"),
        ("first", "no such file; nearest in its folder: first.yaml$"),
        ("quikstart", "nearest in its folder: quick-start.json; nearest built-in recipe: quickstart$"),
        ("zzz.yaml", "built-in recipes: quickstart$"),
        ("there/first.yaml", "no such file; check the path"),
    ],
)
def test_near_files_of_the_folder_are_named(
    tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("first.yaml", "quick-start.json", "first.txt", "builtin/quickstart.yaml"):
        write((tmp_path / file).parent, VALID, Path(file).name)
    with pytest.raises(RecipeError, match=text):
        load_recipe([name], registry=REGISTRY, builtin_dir=tmp_path / "builtin")


@pytest.mark.parametrize("value", ["3", "[]", "[a, 3]", "{a: b}", "null"])
def test_wrong_extends(tmp_path: Path, value: str) -> None:
    assert any(
        "extends: must be a recipe file" in line for line in errors(tmp_path, HEAD + STAGE + f"extends: {value}\n")
    )


def test_extends_of_a_missing_file_names_the_line(tmp_path: Path) -> None:
    (line,) = errors(tmp_path, "\nextends: base.yaml\n")
    assert line.startswith("recipe.yaml:2: extends: no such file: 'base.yaml'")


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "extends: recipe.yaml", "b.yaml")
    (line,) = errors(tmp_path, "extends: ./b.yaml")
    assert "b.yaml:1: extends: the recipes extend each other in a circle: recipe.yaml → b.yaml → recipe.yaml" in line


def test_extends_too_deep_and_too_wide(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path, f"extends: d{i + 1}.yaml", f"d{i}.yaml")
        write(tmp_path, f"extends: [w{i + 1}.yaml, w{i + 1}.yaml]", f"w{i}.yaml")
    assert "more than 16 recipes extend one another" in errors(tmp_path, "extends: d0.yaml")[0]
    assert any("more than 64 recipe files" in line for line in errors(tmp_path, "extends: w0.yaml"))


def test_an_error_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path, HEAD + STAGE.replace("targets", "tragets"), "base.yaml")
    found = errors(tmp_path, "extends: base.yaml\ncalibration: {dataset: d, samples: x}")
    assert [line.split(": ")[0] for line in found] == ["base.yaml:5", "base.yaml:5", "recipe.yaml:2"]


MAPPINGS = [
    ({"model": object()}, "no recipe can hold this object"),
    ({"model": float("nan")}, "no recipe can hold this float"),
    ({"model": 2**70}, "no recipe can hold this int"),
    ({"model": "\ud800"}, "no recipe can hold this str"),
    ({3: 4}, "a key must be text (key 3)"),
    ({"model": {"id": b"x"}}, "model.id: no recipe can hold this bytes"),
    ([1], "must be a mapping (value [1])"),
    ({"modle": "m"}, "modle: unknown key; nearest valid keys: model, moe"),
]


@pytest.mark.parametrize(("mapping", "text"), MAPPINGS, ids=range(len(MAPPINGS)))
def test_wrong_mappings(mapping: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe_mapping(mapping, registry=REGISTRY)
    assert any(text in line for line in str(caught.value).split("\n")), caught.value
    str(caught.value).encode()


def test_a_mapping_that_holds_itself() -> None:
    mapping: dict[str, object] = {"model": "m"}
    mapping["a"] = mapping
    with pytest.raises(RecipeError, match="nested deeper than 64 levels"):
        load_recipe_mapping(mapping, registry=REGISTRY)


def test_long_values_and_keys_are_cut(tmp_path: Path) -> None:
    (line,) = errors(tmp_path, (HEAD + STAGE).replace("model: m", f"model: {{id: m, dtype: {'x' * 10_000}}}"))
    assert len(line) < 300
    (line,) = errors(tmp_path, HEAD + STAGE + f"? {'y' * 10_000}\n: 1\n")
    assert len(line) < 300


def test_messages_print_on_one_line_each(tmp_path: Path) -> None:
    found = errors(tmp_path, HEAD + STAGE + '"a\\nb\\e": 1\n')
    assert found == [
        "recipe.yaml:6: a\\nb\\x1b: unknown key; "
        "valid keys: metadata, model, calibration, output, evaluation, serve, moe, extends, remove, vars, NAME_stage"
    ]
