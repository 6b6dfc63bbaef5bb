"""Configurations: round trips, overrides, every refusal in the words the user reads, and what a resume may change."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.run import config, config_faults, config_text
from herd.run.errors import USAGE, ConfigError
from herd.run.schema import Config
from herd.run.weighting import MaturityAlpha

MINIMAL = "run: {name: try, steps: 10}\nstudents: {scout: {source: scout-nano}}\n"

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
positive = st.floats(min_value=1e-300, max_value=1e300)
fractions = st.floats(min_value=0, max_value=1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | numbers | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
weightings = st.one_of(
    st.fixed_dictionaries({"kind": st.just("constant")}, optional={"alpha": fractions}),
    st.fixed_dictionaries({"kind": st.just("schedule")}, optional={"shape": st.sampled_from(["linear", "staged"])}),
    st.fixed_dictionaries({"kind": st.just("lead")}, optional={"peak": fractions, "width": positive}),
    st.fixed_dictionaries({"kind": st.just("maturity")}, optional={"sure": fractions, "scale": positive}),
    st.fixed_dictionaries({"kind": st.just("confidence")}, optional={"measure": st.sampled_from(["peak", "entropy"])}),
    st.fixed_dictionaries({"kind": st.just("gradients")}, optional={"rule": st.just("mgda"), "kappa": positive}),
)
quantize = st.sampled_from(
    [[], ["int4"], ["fp8", "int4"], [{"scheme": "int4", "group_size": 32}, "fp8"], [{"scheme": "fp8"}]]
)
layers = st.none() | st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)).map(list), min_size=1, max_size=2)
features = st.fixed_dictionaries(
    {"kind": st.sampled_from(["hidden", "relations", "router"])}, optional={"weight": positive, "layers": layers}
)
students = st.fixed_dictionaries(
    {"source": texts},
    optional={
        "overrides": st.dictionaries(texts, values, max_size=3),
        "lr": st.none() | positive,
        "quantize": quantize,
    },
)
trees = st.fixed_dictionaries(
    {
        "run": st.fixed_dictionaries(
            {"name": names, "steps": st.integers(1, 10**12)},
            optional={"folder": texts, "seed": st.integers(0, 2**31 - 1)},
        ),
        "students": st.dictionaries(names.filter(lambda name: name != "teacher"), students, min_size=1, max_size=3),
    },
    optional={
        "data": st.fixed_dictionaries({"source": texts, "subset": st.none() | texts}),
        "optim": st.fixed_dictionaries({"eps": positive, "weight_decay": positive}),
        "loss": st.fixed_dictionaries({"weighting": weightings, "features": st.lists(features, max_size=2)}),
    },
)


def written(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(path, list(overrides))
    assert caught.value.exit_code == USAGE
    return str(caught.value)


@settings(max_examples=150, deadline=None)
@given(tree=trees)
def test_a_dumped_configuration_loads_back_equal(tree: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    original = Config.model_validate_json(json.dumps(tree), strict=True)
    path = written(tmp_path_factory.mktemp("round"), config.dump(original))
    assert config.load(path) == original
    assert config.diff(config.load(path), original) == []


@settings(max_examples=200, deadline=None)
@given(value=values)
def test_yaml_text_reads_back_to_the_same_value(value: object) -> None:
    assert config_text.parse(config_text.write(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-3", 0.002), ("1E5", 1e5), ("-1.5e+3", -1500.0), (".5", 0.5), ("7", 7), ("1_000", 1000), ("0x1f", 31),
        ("true", True), ("no", "no"), ("on", "on"), ("010", "010"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("", None), ("~", None), ("null", None), ("'2e-3'", "2e-3"), ("[int4, fp8]", ["int4", "fp8"]),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    parsed = config_text.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


TOLD_APART_BY_KIND = [("loss", "weighting"), ("loss", "cross_tokenizer")]
real_paths = sorted(
    {
        path
        for path in config_faults.all_paths()
        if len(str(path[-1])) > 2 and path[:2] not in TOLD_APART_BY_KIND and (path[0] != "objective" or len(path) == 1)
    }
)


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(real_paths), place=st.integers(0, 30), letter=st.sampled_from("aeinrstz_"))
def test_an_unknown_key_one_letter_away_suggests_the_nearest(
    path: tuple[str, ...], place: int, letter: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tuple("scout" if part == "NAME" else part for part in path)
    *parents, name = path
    typo = name[: place % (len(name) + 1)] + letter + name[place % (len(name) + 1) :]
    tree = config_text.parse(MINIMAL)
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
    node[typo] = 1
    message = refusal(written(tmp_path_factory.mktemp("typo"), config_text.write(tree)))
    wrong, right = ".".join([*parents, typo]), ".".join(path)
    assert f"{wrong}: unknown; did you mean {right}?" in message


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("run.stepz", "did you mean run.steps?"),
        ("steps", "did you mean run.steps?"),
        ("optim.checkpoint_every", "did you mean run.checkpoint_every?"),
        ("studnets", "did you mean students?"),
        ("students.scout.quantise", "did you mean students.scout.quantize?"),
        ("loss.weighting.horizons", "did you mean loss.weighting.horizon?"),
        ("loss.weighting.alpha", f"allowed here: {', '.join(MaturityAlpha.model_fields)}"),
        ("objective.fraction", "allowed here: kind"),
        ("batch.qqqq", "allowed here: rows, micro_rows"),
    ],
)
def test_an_unknown_key_names_the_nearest_one_of_the_whole_tree(key: str, hint: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    assert refusal(path, f"{key}=1") == f"{path} with --set: {key}: unknown; {hint}"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.steps=true", "run.steps = true: must be a whole number"),
        ("run.steps='5'", "run.steps = '5': must be a whole number"),
        ("run.steps=1.5", "run.steps = 1.5: must be a whole number"),
        ("run.steps=0", "run.steps = 0: must be more than 0"),
        ("run.steps=", "run.steps = null: must be a whole number"),
        ("run.name=3", "run.name = 3: must be text; quote it if it is meant so"),
        ("run.name=a/b", "run.name = a/b: must be letters, digits and . _ - (the first a letter or digit)"),
        ("run.precision=fp16", "run.precision = fp16: must be 'bf16' or 'fp32'"),
        ("optim.lr=fast", "optim.lr = fast: must be a number"),
        ("optim.lr=.nan", "optim.lr = .nan: must be a finite number"),
        ("optim.eps=.inf", "optim.eps = .inf: must be a finite number"),
        ("optim.betas=[0.9]", "optim.betas.1: missing; give a value (the list is too short)"),
        ("optim.betas=[0.9, 1.0]", "optim.betas = [0.9, 1.0]: both must be less than 1"),
        ("optim.decay=0.96", "optim.warmup + optim.decay = 0.05 + 0.96: the two phases overlap"),
        ("tracking.enabled=no", "tracking.enabled = 'no': must be true or false"),
        ("parallel.zero=4", "parallel.zero = 4: must be 1, 2 or 3"),
        ("batch=8", "batch = 8: must be a mapping of fields; leave the key out for the defaults"),
        ("students={}", "students = {}: must be of length 1 or more"),
        ("students.tiny.lr=1", "students.tiny.source: missing; give a value (A spec (`scout-nano`)"),
        ("students.scout.quantize=[int5]", "students.scout.quantize.0.scheme = int5: must be 'int4', 'int4-asym'"),
        ("students.teacher.source=x", "students.teacher: this name is the teacher's; choose another"),
        ("loss.weighting={peak: 1}", "loss.weighting.kind is missing: must be one of constant, schedule, lead"),
        ("loss.weighting.kind=magic", "loss.weighting.kind = magic: must be one of constant, schedule, lead"),
        ("loss.weighting={kind: schedule, begin: 0.9, until: 0.1}",
         "loss.weighting: begin = 0.9 is after until = 0.1; put them in order"),
        ("loss={weighting: {kind: calibration}, temperature: 2}",
         "loss.temperature = 2: loss.weighting.kind = calibration compares the teacher's masses with the labels"),
        ("loss={weighting: {kind: calibration}, divergence: tvd}", "loss.divergence = tvd: loss.weighting.reference"),
        ("loss.weighting={kind: slope}", "run.evaluate_every = 100: loss.weighting.kind = slope learns from held-out"),
        ("loss.weighting={kind: repair, margin: 1}", "loss.weighting.margin = 1: must be less than 1"),
        ("loss.weighting={kind: gap, over: word}", "loss.weighting.over = word: must be 'token', 'step' or 'entropy'"),
        ("batch.micro_rows=3", "batch.micro_rows = 3: must divide batch.rows = 8 at any number of"),
        ("deepspeed.extra={1: 2}", "deepspeed.extra.1: a key must be text; quote it"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_field_value_and_what_is_allowed(
    override: str, line: str, tmp_path: Path
) -> None:
    path = written(tmp_path)
    message = refusal(path, override)
    assert line in message
    assert message.startswith(f"{path} with --set: ")


def test_a_head_start_needs_a_teacher_that_trains(tmp_path: Path) -> None:
    message = refusal(written(tmp_path), "teacher.mode=frozen", "teacher.head_start=5")
    assert (
        "teacher.head_start = 5: a frozen teacher does not train; set it to 0, or teacher.mode to codistill" in message
    )
    message = refusal(written(tmp_path), "teacher.mode=none", "teacher.head_start=5")
    assert "teacher.head_start = 5: there is no teacher to give one (teacher.mode = none); set it to 0, or" in message


@pytest.mark.parametrize("listed", ["[int4, int4]", "[fp8, int4, {scheme: int4, group_size: 32}]"])
def test_two_exports_of_one_name_are_refused(listed: str, tmp_path: Path) -> None:
    message = refusal(written(tmp_path), f"students.scout.quantize={listed}")
    assert message.endswith(
        "students.scout.quantize: int4 is listed 2 times, and each would be the export scout-int4; keep one"
    )


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("[{method: gptq}]", "students.scout.quantize.0: give a scheme, or an allocation in its place"),
        ("[fp8, {scheme: int4, allocation: a.json}]", "students.scout.quantize.1: give a scheme, or an allocation"),
        ("[{allocation: a.json, group_size: 32}]", "quantize.0.group_size = 32: an allocation says it itself"),
        ("[{allocation: a.json, container: gguf}]", "quantize.0.container = gguf: an allocation says it itself"),
        (
            "[{allocation: a b.json}]",
            "quantize.0.allocation = a b.json: the file names the export, and must be",
        ),
        ("[{allocation: x/a.json}, {allocation: y/a.json}]", "each would be the export scout-mixed-a; keep one"),
    ],
)
def test_an_export_has_a_scheme_or_an_allocation(listed: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(written(tmp_path), f"students.scout.quantize={listed}")


def test_several_faults_are_told_at_once_one_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "optim: {lr: x, clip: -1}\nfoo: 1\n")
    header, *lines = refusal(path, "run.stepz=3").splitlines()
    assert header == f"{path} with --set: 4 faults"
    assert sorted(line.strip().partition(":")[0] for line in lines) == [
        "foo",
        "optim.clip = -1",
        "optim.lr = x",
        "run.stepz",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty; it needs at least run.name"),
        ("# nothing\n", "empty; it needs at least run.name"),
        ("- a\n", "holds a list; the top level must be a mapping"),
        ("run:\n  name: a\n b: 2\n", ", line 3: not valid YAML: "),
        ("run: {name: a\n", ", line 2: not valid YAML: "),
        ("run:\n  name: a\n  name: b\n", ", line 3: not valid YAML: key `name` is given twice"),
        ("run: !!python/object:os.system {}\n", ", line 1: not valid YAML: "),
        ("a: \x00\n", "not valid YAML: "),
    ],
)
def test_a_file_that_is_no_configuration_says_where(text: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    message = refusal(path)
    assert message.startswith(str(path))
    assert words in message
    assert len(message.splitlines()) == 1


def test_a_path_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.yaml")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert "not UTF-8 text" in refusal(tmp_path / "latin.yaml")


def test_overrides_reach_every_kind_of_place(tmp_path: Path) -> None:
    loaded = config.load(
        written(tmp_path),
        [
            "optim.lr=2e-3",
            "students.scout.quantize=[int4, {scheme: int4}]",
            "students.scout.quantize.1.scheme=fp8",
            "students.tiny.source=maverick-nano",
            "students.tiny.lr=1e-4",
            "teacher.overrides.num_hidden_layers=4",
            "loss.weighting.peak=0.5",
            "tracking.uri=",
        ],
    )
    assert loaded.optim.lr == 0.002
    assert [q.scheme for q in loaded.students["scout"].quantize] == ["int4", "fp8"]
    assert loaded.students["tiny"].lr == 1e-4
    assert loaded.teacher.overrides == {"num_hidden_layers": 4}
    assert (loaded.loss.weighting.kind, loaded.loss.weighting.peak) == ("maturity", 0.5)
    assert loaded.tracking.uri is None


def test_a_name_with_dots_is_one_key_once_it_is_there(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {name: a, steps: 1}\nstudents: {llama-4.1: {source: x}}\n")
    assert config.load(path, ["students.llama-4.1.lr=1e-4"]).students["llama-4.1"].lr == 1e-4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps", "write it as KEY=VALUE"),
        ("=3", "write it as KEY=VALUE"),
        ("run..steps=3", "write it as KEY=VALUE"),
        ("run.steps=[1", "the value is no YAML"),
        ("run.steps.x=1", "run.steps = 10 has no fields; set it whole"),
        ("students.scout.quantize.0.scheme=int4", "students.scout.quantize = {'0': {scheme: int4}}: must be a list"),
    ],
)
def test_a_malformed_override_is_refused(override: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(written(tmp_path), override)


def test_a_list_is_entered_by_position_only(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {name: a, steps: 1}\nstudents: {s: {source: x, quantize: [int4]}}\n")
    assert "is a list of 1; give a position" in refusal(path, "students.s.quantize.1.scheme=fp8")
    assert "is a list of 1; give a position" in refusal(path, "students.s.quantize.first=fp8")
    assert config.load(path, ["students.s.quantize.0=fp8"]).students["s"].quantize[0].scheme == "fp8"


@given(
    rows=st.integers(1, 512),
    micro_rows=st.none() | st.integers(1, 64),
    world=st.integers(1, 32),
)
def test_the_batch_equation_holds_or_is_spelled_out(rows: int, micro_rows: int | None, world: int) -> None:
    tree = config_text.parse(MINIMAL) | {"batch": {"rows": rows, "micro_rows": micro_rows}}
    wanted = Config.model_validate(tree)
    possible = rows % world == 0 and (micro_rows is None or rows // world % micro_rows == 0)
    if possible:
        micro, accumulation = config.split_batch(wanted, world)
        assert micro * accumulation * world == rows
        assert micro_rows in (None, micro)
        assert micro_rows is not None or accumulation == 1
    else:
        with pytest.raises(ConfigError, match=r"batch\.rows = micro_rows x accumulation x ranks does not hold"):
            config.split_batch(wanted, world)


def test_a_batch_that_does_not_split_names_values_that_do(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path), ["batch.rows=8"])
    with pytest.raises(
        ConfigError, match=r"batch\.rows = 8: .* multiple of 3 \(such as 6 or 9\), or start 1, 2, 4, 8 ranks"
    ):
        config.split_batch(loaded, 3)
    loaded = config.load(written(tmp_path), ["batch.rows=8", "batch.micro_rows=8"])
    with pytest.raises(ConfigError, match=r"has 8 / 2 = 4 rows; use one of 1, 2, 4$"):
        config.split_batch(loaded, 2)


def test_a_choice_of_one_is_not_called_a_choice(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert refusal(path, "batch.rows=1", "batch.micro_rows=2").endswith("at any number of ranks; use 1")
    with pytest.raises(ConfigError, match=r"has 8 / 8 = 1 rows; use 1$"):
        config.split_batch(config.load(path, ["batch.rows=8", "batch.micro_rows=2"]), 8)
    with pytest.raises(ConfigError, match=r"must divide the 1 ranks; use 1$"):
        config.split_batch(config.load(path, ["parallel.expert_parallel=2"]), 1)
    with pytest.raises(ConfigError, match=r"\(such as 2\), or start 1 rank$"):
        config.split_batch(config.load(path, ["batch.rows=1"]), 2)


def test_experts_are_spread_over_whole_groups_of_ranks(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path), ["parallel.expert_parallel=4", "batch.rows=12"])
    assert config.split_batch(loaded, 4) == (3, 1)
    with pytest.raises(
        ConfigError, match=r"parallel\.expert_parallel = 4: must divide the 6 ranks; use one of 1, 2, 3, 6"
    ):
        config.split_batch(loaded, 6)


def test_a_diff_shows_every_change_and_a_resume_refuses_only_what_is_computed_otherwise(tmp_path: Path) -> None:
    path = written(tmp_path)
    old = config.load(path)
    new = config.load(
        path,
        [
            "optim.lr=1e-3",
            "run.checkpoint_every=7",
            "students.scout.quantize=[int4]",
            "students.scout.overrides.quantize_x=1",
            "tracking.experiment=other",
            "evaluation.decode_tokens=1",
        ],
    )
    changes = config.diff(old, new)
    assert "optim.lr: 0.002 -> 0.001" in changes
    assert any(line.startswith("students.scout.quantize: [] -> [{scheme: int4, group_size: 64") for line in changes)
    assert len(changes) == 7  # the overrides mapping goes away and its entry comes
    blocking = config.blocking_changes(old, new)
    assert blocking == [line for line in changes if line.startswith(("optim.lr", "students.scout.overrides"))]
    assert config.blocking_changes(old, config.load(path, ["run.steps=11"])) == ["run.steps: 10 -> 11"]
    steered, sooner = (
        config.load(path, ["run.steps=90", "loss.weighting={kind: slope}", f"run.evaluate_every={n}"]) for n in (4, 5)
    )
    assert config.blocking_changes(steered, sooner) == ["run.evaluate_every: 4 -> 5"]  # held-out losses move its weight
    added = config.blocking_changes(old, config.load(path, ["students.tiny.source=scout-nano"]))
    assert "students.tiny.source: (absent) -> scout-nano" in added


def test_nothing_that_is_not_finite_survives_in_free_mappings(tmp_path: Path) -> None:
    message = refusal(written(tmp_path), "teacher.overrides.rope_theta=.inf")
    assert "teacher.overrides.rope_theta = .inf: must be a finite number" in message
    assert math.isfinite(
        config.load(written(tmp_path), ["teacher.overrides.rope_theta=5e5"]).teacher.overrides["rope_theta"]
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.features=[{kind: hiden}]", r"loss\.features\.0\.kind = hiden: must be one of hidden, relations, router"),
        ("loss.features=[{measure: mse}]", r"loss\.features\.0\.kind is missing: must be one of hidden, relations"),
        ("loss.features=[{kind: hidden, mesure: mse}]", r"features\.0\.mesure: unknown; did you mean .*measure"),
        ("loss.features=[{kind: hidden, measure: l2}]", r"features\.0\.measure = l2: must be 'mse', 'normalised_mse'"),
        ("loss.features=[{kind: hidden, layers: [[0, -1]]}]", r"features\.0\.layers\.0\.1 = -1: must be 0 or more"),
        ("loss.features=[{kind: relations, of: [q, o]}]", r"features\.0\.of\.1 = o: must be 'q', 'k' or 'v'"),
        (
            "loss.features=[{kind: hidden, students: [scot]}]",
            r"features\.0\.students: no student is called scot; there",
        ),
        ("loss.cross_tokenizer={kind: gold}", r"loss\.cross_tokenizer\.kind = gold: must be one of uld, spans"),
        ("loss.cross_tokenizer={kind: spans, matched_weight: 2}", r"matched_weight = 2: must be 1 or less"),
        (
            "loss.cross_tokenizer={kind: uld}",
            r"only a frozen teacher can have its own tokenizer; teacher\.mode is codi",
        ),
    ],
)
def test_faults_of_feature_and_cross_tokenizer_losses_name_the_field(override, words):
    with pytest.raises(ConfigError, match=words):
        config.load("configs/smoke.yaml", [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.mode=none", "teacher.head_start=0", "loss.features=[{kind: hidden}]"], "needs a teacher that runs"),
        (["loss.features=[{kind: hidden}]", "loss.cross_tokenizer={kind: spans}"], "cannot be compared one by one"),
        (["loss.temperature=2", "loss.cross_tokenizer={kind: spans}"], r"loss\.temperature = 2: must be 1"),
        (["loss.weighting={kind: gradients}", "loss.cross_tokenizer={kind: uld}"], r"kind = gradients: compares a tok"),
        (["loss.weighting={kind: calibration}", "loss.cross_tokenizer={kind: uld}"], r"kind = calibration: compares a"),
        (["loss.weighting={kind: gate}", "loss.cross_tokenizer={kind: spans}"], r"kind = gate: compares a token with"),
        (["loss.weighting={kind: gap}", "loss.cross_tokenizer={kind: spans}"], r"over = entropy: the tokens of a span"),
    ],
)
def test_losses_that_a_teacher_cannot_give_are_refused_together_with_the_mend(overrides, words):
    with pytest.raises(ConfigError, match=words):
        config.load("configs/smoke.yaml", overrides)
