"""Rows, and plugs and stages that are made by name: what a text means, what it is known by, what is refused."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import make_dataclass
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import ditkit
from ditkit import options, registry
from ditkit.assembly import PLUGS, STAGES, TASKS, PlugRow
from ditkit.assembly.plugs import plugs_of, received, texts_of
from ditkit.contracts import Seams
from ditkit.errors import PipelineError, RequestError, SetupError, StateError
from ditkit.nn.attention import ATTENTION, sdpa
from ditkit.registry import PlugSpec, Registry, bring
from ditkit.schedulers import SCHEDULERS, make
from ditkit.setup import Setup

FILES = Path(__file__).parents[1] / "plugs"
pytestmark = pytest.mark.usefixtures("forgotten")
PROMPT = "a red circle"


@pytest.fixture
def mine(tmp_path) -> str:
    return str(shutil.copy(FILES / "my_plugs.py", tmp_path))


@pytest.fixture
def rows(tmp_path) -> str:
    return str(shutil.copy(FILES / "my_rows.py", tmp_path))


def edit(file: str, old: str, new: str) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


def latents(pipe, **request) -> torch.Tensor:
    values = {"prompt": PROMPT, "seed": 3, **request}
    return pipe.run(pipe.begin(pipe.request(values)), until="denoise").state["latents"]


@pytest.fixture(scope="module")
def bare(tiny_model) -> torch.Tensor:
    return latents(ditkit.load(tiny_model))


# --- texts


@pytest.mark.parametrize(
    ("text", "parts", "is_code"),
    [
        ("halve", ("halve", "", "", ""), False),
        ("halve:every=2,mode=fast", ("halve", "", "", "every=2,mode=fast"), False),
        ("halve:file=x.py", ("halve", "", "", "file=x.py"), False),
        ("dpm++", ("dpm++", "", "", ""), False),
        (f"halve@{'a' * 64}", ("halve", "a" * 64, "", ""), False),
        ("a/b.py", ("a/b.py", "", "", ""), True),
        ("a.py/b.py:Halve:every=2", ("a.py/b.py", "", "Halve", "every=2"), True),
        (r"C:\x\b.py:Halve", (r"C:\x\b.py", "", "Halve", ""), True),
        (f"you@there/b.py@{'0' * 64}:Halve", ("you@there/b.py", "0" * 64, "Halve", ""), True),
        ("package.module", ("package.module", "", "", ""), True),
        ("module:Halve:x=a=b", ("module", "", "Halve", "x=a=b"), True),
    ],
)
def test_the_forms_of_a_plug(text, parts, is_code):
    spec = PlugSpec.parse(text)
    assert (spec.code, spec.sha256, spec.attribute, spec.options) == parts
    assert spec.is_code is is_code
    assert str(spec) == text
    assert spec.short == text.replace("@" + spec.sha256, "") if spec.sha256 else spec.short == text


@pytest.mark.parametrize("text", ["", "a b", "x.py:9", "halve:", ":Halve", "halve:1=2"])
def test_what_is_no_plug(text):
    with pytest.raises(SetupError, match=r"plugs=.*has none of the forms of a plug. Give a list of plugs"):
        Setup.of({"plugs": [text]})


def test_options_are_typed_by_their_fields(mine):
    cls = bring(mine).module.Interval
    assert options.typed(cls, "low=1,high=0.5", "x") == {"low": 1.0, "high": 0.5}
    assert isinstance(options.typed(cls, "low=1", "x")["low"], float)
    assert options.typed(bring(mine).module.Skip, "note=7", "x") == {"note": "7"}
    for given, said in (
        ("low=a", "low='a' of x: input should be a valid number"),
        ("low=1,low=2", "'low=2' is not one of the form OPTION=VALUE, once each"),
        ("low=1,hihg=2", r"option 'hihg' of x: there is none of that name \(did you mean 'high'\?\)"),
        ("high=1", "x: it needs its option low"),
        ("low", "'low' is not one of the form"),
    ):
        with pytest.raises(SetupError, match=said):
            options.typed(cls, given, "x")


VALUES = {"a": 1, "b": 2.5, "c": "x, y=z", "d": True, "e": (1, 2), "f": None, "g": 'a "word"'}
KINDS = {"a": int, "b": float, "c": str, "d": bool, "e": tuple[int, ...], "f": int | None, "g": str}
TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=6) | st.text("\"'\\,=[]{} a\x7f\n", max_size=6)


def test_options_survive_as_text():
    cls = make_dataclass("Some", [*KINDS.items()], frozen=True)
    assert options.typed(cls, options.as_text(VALUES), "x") == VALUES


@hypothesis.given(TEXTS, st.floats(), st.lists(TEXTS), st.dictionaries(TEXTS, st.lists(st.floats())))
def test_any_option_survives_as_text(text, number, words, table):
    kinds = {"a": str, "b": float, "c": list[str], "d": dict[str, list[float]], "e": list[str | None]}
    cls = make_dataclass("Any", [*kinds.items()])
    values = {"a": text, "b": number, "c": words, "d": table, "e": [None, *words]}
    assert repr(options.typed(cls, options.as_text(values), "x")) == repr(values)
    assert repr(options.typed(cls, values, "x")) == repr(values)


# --- each seam


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seam"),
    [
        ("Skip:block=0", "run_blocks"),
        ("Interval:low=0.9", "predict"),
        ("softer", "attend"),
        ("Renoise:strength=0.5", "scheduler"),
        ("Damped:by=0.25", "swaps"),
    ],
)
def test_a_plug_of_a_file_goes_in_and_its_absence_restores(tiny_model, bare, mine, name, seam):
    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:{name}"])
    assert list(pipe.seams.describe()) == [seam]
    assert (latents(pipe) - bare).abs().max() > 1e-3
    assert torch.equal(latents(ditkit.load(tiny_model)), bare)


@pytest.mark.slow
def test_a_plug_by_name_computes_what_the_object_does(tiny_model, mine):
    module = bring(mine).module
    for name, seams in (
        ("Skip:block=0", Seams(run_blocks=(module.Skip(0),))),
        ("Interval:low=0.9", Seams(predict=(module.Interval(0.9),))),
        ("softer", Seams(attend=(module.softer,))),
        ("Renoise", Seams(scheduler=module.Renoise())),
    ):
        by_name = latents(ditkit.load(tiny_model, plugs=[f"{mine}:{name}"]))
        assert torch.equal(by_name, latents(ditkit.load(tiny_model, seams=seams))), name


def test_the_first_of_the_setting_is_the_outermost_and_python_is_inside(tiny_model, mine):
    def inner(predict):
        return predict

    pipe = ditkit.load(
        tiny_model, plugs=[f"{mine}:Interval:low=0.1", f"{mine}:Interval:low=0.2"], seams=Seams(predict=(inner,))
    )
    assert [getattr(plug, "low", None) for plug in pipe.seams.predict] == [0.1, 0.2, None]


@pytest.mark.slow
def test_a_listener_hears_and_is_in_no_fingerprint(tiny_model, mine):
    plain, heard = ditkit.load(tiny_model)(PROMPT, seed=3), bring(mine).module.HEARD
    result = ditkit.load(tiny_model, plugs=[f"{mine}:Listen"])(PROMPT, seed=3)
    assert {"stage.start", "step.end", "frames"} <= set(heard)
    assert result.state.fingerprints == plain.state.fingerprints
    assert result.receipt["plugged"][0]["plug"] == "my_plugs.py:Listen"


def test_a_run_has_one_scheduler(tiny_model, mine):
    with pytest.raises(SetupError, match="the schedulers renoise and unipc: a run has one"):
        ditkit.load(tiny_model, plugs=[f"{mine}:Renoise"], seams=Seams(scheduler=make("unipc")))
    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:Renoise"])
    for values in ({"scheduler": "euler"}, {"scheduler_options": {"order": 1}}):
        with pytest.raises(RequestError, match="the plug 'renoise' is the scheduler of this run"):
            pipe(PROMPT, **values)


# --- rows


def test_rows_of_a_file_are_known_by_name(tiny_model, bare, rows):
    bring(rows)
    assert {"louder", "count", "halved", "twice", "short"} <= {*PLUGS, *STAGES, *ATTENTION, *SCHEDULERS, *TASKS}
    changed = latents(ditkit.load(tiny_model, plugs=[rows, "louder:factor=1.5"]))
    assert not torch.equal(changed, bare)
    assert make("twice", factor=2.0).factor == 2.0
    with pytest.raises(RequestError, match="factor='2' of scheduler 'twice': input should be a valid number"):
        make("twice", factor="2")


def test_of_a_whole_file_all_that_can_be_plugged_in_goes_in_once(tiny_model, rows):
    whole = ditkit.load(tiny_model, plugs=[rows])
    assert whole.stages.names[0] == "count"
    assert [plug.factor for plug in whole.seams.predict] == [2.0]
    named = ditkit.load(tiny_model, plugs=[rows, "louder:factor=3"])
    assert [plug.factor for plug in named.seams.predict] == [3.0]
    assert named.stages.names[0] == "count"
    one = ditkit.load(tiny_model, plugs=[f"{rows}:COUNT"])
    assert one.stages.names[0] == "count"
    assert one.seams.predict == ()
    assert one(["a red circle", "a square"], seed=1).state["words"] == [3, 2]


def test_a_kernel_by_name(tiny_model, bare, rows):
    pipe = ditkit.load(tiny_model, plugs=[f"{rows}:KERNEL"], attention="halved")
    state = pipe.run(pipe.begin(pipe.request({"prompt": PROMPT, "seed": 3})), until="denoise").state
    assert not torch.equal(state["latents"], bare)
    assert state["records"]["denoise"]["options"]["attention"] == f"halved@{ATTENTION.code('halved')}"
    with pytest.raises(SetupError, match="attention='absent': its library is not installed"):
        ditkit.load(tiny_model, plugs=[f"{rows}:KERNEL"], attention="absent")
    with pytest.raises(SetupError, match=r"the attention kernel 'sdap': .*did you mean 'sdpa'"):
        ditkit.load(tiny_model, attention="sdap")


def test_ditkits_own_rows_are_known_by_their_names_alone():
    assert ATTENTION.pinned("sdpa") == "sdpa"
    assert SCHEDULERS.pinned("unipc") == "unipc"
    assert ATTENTION.origin("dense") == "ditkit"
    assert ATTENTION["sdpa"].made is sdpa


def test_a_name_belongs_to_one(tmp_path, rows):
    bring(rows)
    other = tmp_path / "other.py"
    other.write_text("from ditkit.schedulers import SchedulerRow\nROW = SchedulerRow('unipc', dict)\n")
    with pytest.raises(
        SetupError, match=r"the scheduler 'unipc' of .*other.py: ditkit has one of that name. Rename it"
    ):
        bring(str(other))
    other.write_text(Path(rows).read_text() + "\n")
    with pytest.raises(SetupError, match=r"of .*other.py: .*my_rows.py has one of that name"):
        bring(str(other))
    shutil.copy(rows, tmp_path / "copy.py")
    bring(str(tmp_path / "copy.py"))  # the same content is the same


def test_an_edited_file_brings_its_rows_anew(rows):
    bring(rows)
    before = PLUGS.code("louder")
    edit(rows, 'PlugRow("louder"', 'PlugRow("loudest"')
    bring(rows)
    assert "louder" not in PLUGS
    assert PLUGS.code("loudest") not in ("", before)
    edit(rows, 'PlugRow("loudest"', 'PlugRow("louder"')
    bring(rows)
    assert "loudest" not in PLUGS
    assert PLUGS.code("louder") == before


# --- identity


def prints(model, plugs, **request):
    pipe = ditkit.load(model, plugs=plugs)
    return pipe.run(pipe.begin(pipe.request({"prompt": PROMPT, "seed": 3, **request}))).state.fingerprints


@pytest.mark.slow
def test_a_fingerprint_holds_name_options_and_code(tiny_model, tmp_path, mine):
    def of(text, file=mine):
        return prints(tiny_model, [f"{file}:{text}"])["latents"]

    first = of("Skip")
    assert of("Skip:block=1") == first, "a default that is written out"
    assert of("Skip:note=slow") == first, "an option that promises equal results"
    assert of("Skip:block=0") != first
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copied = shutil.copy(mine, elsewhere)
    assert of("Skip", copied) == first, "where the file lies says nothing"
    registry.BROUGHT.clear()  # as in another process
    one, two = (prints(tiny_model, [f"{file}:Sharpness"])["sharpness"] for file in (mine, copied))
    assert one == two
    edit(mine, "Leaves one block out.", "Leaves out one block.")
    assert of("Skip") != first


@pytest.mark.slow
@pytest.mark.parametrize("which", ["kernel", "scheduler", "stage", "swap"])
def test_an_edit_changes_the_fingerprints_of_what_it_computes(tiny_model, mine, rows, which):
    def of():
        match which:
            case "kernel":
                pipe, request = ditkit.load(tiny_model, plugs=[f"{rows}:KERNEL"], attention="halved"), {}
            case "scheduler":
                pipe, request = ditkit.load(tiny_model, plugs=[f"{rows}:TWICE"]), {"scheduler": "twice"}
            case "stage":
                pipe, request = ditkit.load(tiny_model, plugs=[f"{mine}:Sharpness"]), {}
            case "swap":
                pipe, request = ditkit.load(tiny_model, plugs=[f"{mine}:Damped"]), {}
        state = pipe.run(pipe.begin(pipe.request({"prompt": PROMPT, "seed": 3, "steps": 2, **request}))).state
        assert pipe.run(state).state.fingerprints == state.fingerprints, "all of it is done"
        return state.fingerprints["sharpness" if which == "stage" else "latents"]

    first = of()
    assert of() == first
    for file in (mine, rows):
        Path(file).write_text(Path(file).read_text() + "\n# edited\n")
    assert of() != first


def test_the_code_is_that_which_was_imported(tiny_model, mine):
    """A file that is edited while a pipe is open changes neither what it computes nor its name."""
    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:Skip", f"{mine}:Sharpness"])
    first = pipe(PROMPT, seed=3)
    Path(mine).write_text("nonsense(")
    again = pipe(PROMPT, seed=3)
    assert again.state.fingerprints == first.state.fingerprints
    assert again.receipt["plugged"] == first.receipt["plugged"]


def test_a_hash_is_looked_at_before_the_code_runs(tmp_path):
    file = tmp_path / "loud.py"
    file.write_text("raise SystemExit('it ran')\n")
    with pytest.raises(SetupError, match=f"its sha256 is {PlugSpec(str(file)).placed().sha256[:16]}, and {'0' * 16}"):
        bring(str(file), "0" * 64)
    with pytest.raises(SetupError, match="it fails with SystemExit: it ran"):
        bring(str(file))


def test_going_on_with_another_plug_is_told(tiny_model, mine):
    plain, heard = ditkit.load(tiny_model), []
    half = plain.run(plain.begin(plain.request({"prompt": PROMPT, "seed": 3})), stop_at_step=2).state
    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:Skip"], listeners=[heard.append])
    rest = pipe.run(half)
    (told,) = [event["text"] for event in heard if event.name == "plug.changed"]
    assert told.startswith("denoise goes on with something else plugged in: run_blocks was nothing, is my_plugs.py@")
    assert rest.state.fingerprints["latents"] != plain.run(half).state.fingerprints["latents"]
    assert rest.state.fingerprints["latents"] != prints(tiny_model, [f"{mine}:Skip"])["latents"]


# --- stages with settings of their own


def test_a_stage_reads_its_own_settings(tiny_model, mine):
    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:Sharpness:offset=1"])
    one, three = (pipe(PROMPT, seed=3, sharpness={"amount": x}).state for x in (1, 3))
    torch.testing.assert_close(three["sharpness"] - 1, 3 * (one["sharpness"] - 1))
    assert three["request"]["stage_settings"] == {"sharpness": {"amount": 3.0, "mode": "mean"}}
    assert three["records"]["sharpness"]["settings"] == {"sharpness.amount": 3.0, "sharpness.mode": "mean"}
    assert three["records"]["sharpness"]["options"] == {"offset": 1.0}
    changed = {name for name in one.fingerprints if one.fingerprints[name] != three.fingerprints.get(name)}
    assert changed == {"sharpness"}


def test_a_state_goes_on_with_the_settings_that_it_was_begun_with(tiny_model, mine, tmp_path):
    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:Sharpness"])
    whole = pipe(PROMPT, seed=3, sharpness={"mode": "max"}).state
    half = pipe.run(pipe.begin(pipe.request({"prompt": PROMPT, "seed": 3, "sharpness": {"mode": "max"}})),
                    stop_at_step=2).state  # fmt: skip
    half.save(tmp_path / "half.safetensors")
    rest = ditkit.load(tiny_model, plugs=[f"{mine}:Sharpness"]).run(ditkit.State.load(tmp_path / "half.safetensors"))
    assert rest.state.equal(whole)
    assert rest.state.fingerprints == whole.fingerprints
    asked = whole.with_fields(
        {"request": {**whole["request"], "stage_settings": {"sharpness": {"amount": 2.0, "mode": "max"}}}}
    )
    heard = []
    again = pipe.run(asked, listeners=[heard.append])
    assert [e["reasons"] for e in heard if e.name == "stage.outdated"] == [["sharpness.amount was 1.0, is 2.0"]]
    assert torch.equal(again.state["sharpness"], 2 * whole["sharpness"])


def test_a_state_of_a_pipeline_without_the_stage(tiny_model, mine):
    plain = ditkit.load(tiny_model)(PROMPT, seed=3).state
    assert plain["request"]["stage_settings"] == {}
    more = ditkit.load(tiny_model, plugs=[f"{mine}:Sharpness"]).run(plain).state
    assert more["request"]["stage_settings"] == {"sharpness": {"amount": 1.0, "mode": "mean"}}
    assert "sharpness" in more


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sharpness": {"amunt": 3}}, r"option 'amunt' of the settings of stage 'sharpness': .*did you mean 'amount'"),
        ({"sharpness": {"amount": "3"}}, "amount='3' of the settings of stage 'sharpness': input should be a valid"),
        ({"sharpness": {"mode": "min"}}, "mode 'min' is neither mean nor max"),
        ({"stage_settings": {"sharpnes": {"amount": 3}}}, r"sharpnes.amount: no stage 'sharpnes' .*mean 'sharpness'"),
        ({"stage_settings": {"denoise": {"amount": 3}}}, "no stage 'denoise' with settings is in this pipeline"),
        ({"sharpness": 3}, "stage_settings"),
    ],
)
def test_a_wrong_setting_of_a_stage(tiny_model, mine, values, said):
    with pytest.raises(RequestError, match=said):
        ditkit.load(tiny_model, plugs=[f"{mine}:Sharpness"])(PROMPT, **values)


def test_without_the_stage_its_name_is_no_setting(tiny_model):
    with pytest.raises(RequestError, match="there is no setting 'sharpness'"):
        ditkit.load(tiny_model)(PROMPT, sharpness={"amount": 3})


# --- what travels


def test_plugs_are_made_again_from_their_texts(mine, rows):
    names = ["Skip:block=0", "Interval:low=0.5", "softer", "Renoise", "Damped:by=2"]
    texts = [*(f"{mine}:{name}" for name in names), f"{rows}:LOUDER:factor=3"]
    made = ditkit.assembly.plugs.plugged(Setup(plugs=texts), Seams())[0]
    sent = texts_of(made)
    assert len(sent) == 6
    assert not any(str(Path(mine).parent) in text for text in sent), "where a file lies does not travel"
    again = received(sent)
    assert again.describe() == made.describe()
    assert again.run_blocks == made.run_blocks
    assert texts_of(again) == sent
    assert texts_of(Seams(predict=(*made.predict, lambda predict: predict))) is None


def test_a_job_brings_no_code(mine, tmp_path):
    ran = tmp_path / "ran"
    file = tmp_path / "evil.py"
    file.write_text(f"open({str(ran)!r}, 'w')\ndef plug(inner):\n    return inner\nplug.seam = 'predict'\n")
    sha256 = PlugSpec(str(file)).placed().sha256
    for text in (f"{file}:plug", f"{file}@{sha256}:plug", f"evil.py@{sha256}:plug", "this:plug", "antigravity:fly"):
        with pytest.raises(SetupError, match="this end was started without that code"):
            received([text])
    assert not ran.exists()
    sha256 = bring(mine).sha256
    for name in ("Sharpness", "Listen"):
        with pytest.raises(SetupError, match="is in no job"):
            received([f"my_plugs.py@{sha256}:{name}"])


# --- mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{mine}", r"it holds no rows. Name what is meant: .*my_plugs.py:Skip"),
        ("{mine}:Skop", r"it has no 'Skop' \(did you mean 'Skip'\?\)"),
        ("{mine}:Amount", r"it is a class without seam \(predict, run_blocks, .*Name a row, a class or function with"),
        ("{mine}:PROMPT", "it has no 'PROMPT'"),
        ("{mine}:torch", "it is a module. Name a row"),
        ("{mine}:Brighter", "it does not say beside which stage it stands. Give it before or after"),
        ("{mine}:softer:by=2", "option 'by' of the plug 'softer': there is none of that name. It has no options"),
        ("{rows}:KERNEL:x=1", "options of attention kernels are not given here"),
        ("{rows}:x=1", "options are of one plug"),
        ("{rows}:TWICE:factor=2", "options of schedulers are not given here"),
        ("louder", "the plug 'louder': there is none of that name. Bring it: FILE.py:NAME"),
        ("euler", "it is a scheduler, which a setting of its own names"),
        ("denoise", "the stage 'denoise': it does not say beside which stage it stands"),
        ("nowhere.py:Skip", "bringing nowhere.py: no such file"),
        ("no_such_module:Skip", "No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_plugged_in(tiny_model, mine, rows, text, said):
    with pytest.raises(SetupError, match=said):
        ditkit.load(tiny_model, plugs=[text.format(mine=mine, rows=rows)])


BROKEN = Path(__file__).parents[1] / "plugs" / "broken.py"


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("NotMade", SetupError, "the plug 'NotMade': making it fails with RuntimeError: no such device"),
        ("NotWrapped", ValueError, "not today"),
        ("NotGiven", PipelineError, "plugging NotGiven into the seam attend: it gave NoneType"),
        ("NotRun", KeyError, "missing"),
        ("NotMatched", ZeroDivisionError, "by nothing"),
        ("NotHeard", LookupError, "load.fail"),
        ("Forgotten", PipelineError, "running stage 'forgotten': it returned NoneType. Return a dict of"),
        ("Listed", PipelineError, "running stage 'listed': it returned list. Return a dict of"),
        ("Raised", KeyError, "no such word"),
        ("NotBegun", SetupError, "the stage 'not_begun': making it fails with ValueError: not even begun"),
        ("Left", PipelineError, "running stage 'left': it ended Python .exit 3.. Raise an error instead"),
        ("Numbered", SetupError, "it is a class without seam"),
    ],
)
def test_a_fault_in_a_plug_says_whose_it_is(tiny_model, name, kind, said):
    with pytest.raises(kind, match=said) as fault:
        ditkit.load(tiny_model, plugs=[f"{BROKEN}:{name}"])(PROMPT, steps=2)
    noted = " ".join(getattr(fault.value, "__notes__", [said]))
    places = {"Raised": "running stage 'raised'", "NotMatched": "making the swap 'NotMatched' in WanTransformer",
              "NotHeard": "telling the listener NotHeard of load.fail"}  # fmt: skip
    assert kind in (SetupError, PipelineError) or places.get(name, name) in noted


@pytest.mark.parametrize("stop", [1.0, "1", True, -1])
def test_a_step_to_stop_at_is_a_whole_number(tiny_model, stop):
    pipe = ditkit.load(tiny_model)
    with pytest.raises(PipelineError, match=f"stop_at_step={stop!r}: .* Give a whole number, 0 or more"):
        pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT})), stop_at_step=stop)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = 1 / 0", "it fails with ZeroDivisionError"),
        ("class P:\n seam = 'predikt'", r"its seam is 'predikt' \(did you mean 'predict'\?\)"),
        ("class P:\n seam = 'predict'", "it lacks __call__, which a plug of seam predict has"),
        ("class P:\n seam = 'swap'\n def match(self, n, m): return True", "it lacks make"),
        (
            "from dataclasses import dataclass\n@dataclass(frozen=True, slots=True)\nclass P:\n x: int = 1\n"
            " def __call__(self, inner): return inner\nP.seam = 'predict'",
            "it cannot be named by its options and its code",
        ),
    ],
)
def test_a_plug_that_is_none(tiny_model, tmp_path, body, said):
    (tmp_path / "p.py").write_text(body + "\n")
    with pytest.raises(SetupError, match=said):
        ditkit.load(tiny_model, plugs=[f"{tmp_path}/p.py:P"])


def test_a_stage_is_put_beside_another_one(tiny_model, mine):
    edit(mine, 'after = "decode_latents"', 'after = "decode"')
    with pytest.raises(ditkit.DitkitError, match=r"stage 'decode': there is none .*did you mean"):
        ditkit.load(tiny_model, plugs=[f"{mine}:Sharpness"])


# --- installed packages


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package on the path, with its metadata: nothing of it is ditkit's."""
    root = tmp_path / "site"
    (root / "their_plugs").mkdir(parents=True)
    (root / "their_plugs" / "__init__.py").write_text("")
    shutil.copy(FILES / "my_rows.py", root / "their_plugs" / "rows.py")
    about = root / "their_plugs-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugs\nVersion: 1.2\n")
    points = {"plugs": "louder = their_plugs.rows:LOUDER", "stages": "count = their_plugs.rows:COUNT",
              "attention": "halved = their_plugs.rows:KERNEL", "schedulers": "twice = their_plugs.rows:TWICE",
              "tasks": "short = their_plugs.rows:SHORT"}  # fmt: skip
    (about / "entry_points.txt").write_text("".join(f"[ditkit.{group}]\n{line}\n" for group, line in points.items()))
    monkeypatch.syspath_prepend(root)
    importlib.invalidate_caches()
    for each in Registry.every:
        each.__dict__.pop("_installed", None)
    yield root
    for each in Registry.every:
        each.__dict__.pop("_installed", None)
    for name in [name for name in sys.modules if name.startswith("their_plugs")]:
        del sys.modules[name]


def test_rows_of_installed_packages(tiny_model, bare, installed):
    assert "their_plugs.rows" not in sys.modules, "nothing is imported before it is asked for"
    for rows, name in ((PLUGS, "louder"), (STAGES, "count"), (ATTENTION, "halved"), (SCHEDULERS, "twice"),
                       (TASKS, "short")):  # fmt: skip
        assert name in rows
        assert rows.origin(name) == "their-plugs 1.2"
        assert len(rows.code(name)) == 64
    assert "their_plugs.rows" not in sys.modules
    pipe = ditkit.load(tiny_model, plugs=["louder:factor=1.5", "count"], attention="halved")
    result = pipe(PROMPT, seed=3, scheduler="twice", scheduler_options={"factor": 0.5})
    assert result.state["words"] == [3]
    assert not torch.equal(result.state["latents"], bare)
    assert pipe.seams.describe() == {"predict": [f"louder@{PLUGS.code('louder')}:factor=1.5"]}
    assert result.receipt["plugged"][0] == {
        "plug": "louder:factor=1.5", "sha256": PLUGS.code("louder"), "path": "their-plugs 1.2"
    }  # fmt: skip
    again = received(texts_of(pipe.seams))
    assert again.describe() == pipe.seams.describe()
    with pytest.raises(SetupError, match=r"the plug 'louder': its code is .*, and 0000000000000000 is asked for"):
        received([f"louder@{'0' * 64}:factor=1.5"])


def test_a_new_version_of_a_package_is_other_code(installed):
    before = PLUGS.code("louder")
    about = installed / "their_plugs-1.2.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugs\nVersion: 1.3\n")
    PLUGS.__dict__.pop("_installed")
    importlib.invalidate_caches()
    assert PLUGS.code("louder") not in ("", before)


def test_two_packages_that_bring_one_name(installed):
    other = installed / "others-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[ditkit.plugs]\nlouder = their_plugs.rows:LOUDER\n")
    PLUGS.__dict__.pop("_installed", None)
    importlib.invalidate_caches()
    with pytest.raises(SetupError, match="bring one of that name"):
        plugs_of(["louder"])


def test_an_installed_row_does_not_take_ditkits_name(installed):
    (installed / "their_plugs-1.2.dist-info" / "entry_points.txt").write_text(
        "[ditkit.attention]\nsdpa = their_plugs.rows:KERNEL\n"
    )
    ATTENTION.__dict__.pop("_installed", None)
    importlib.invalidate_caches()
    assert ATTENTION["sdpa"].made is sdpa
    assert ATTENTION.origin("sdpa") == "ditkit"


# --- runs


def test_a_run_of_somebody_else_starts_no_code(tiny_model, mine, tmp_path):
    from ditkit.runs import Run

    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:Skip"])
    run = Run.create(tmp_path / "run", pipe, PROMPT, seed=3)
    run.go(stop_at_step=2)
    Path(mine).write_text(Path(mine).read_text() + f"\n__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(StateError, match=r"it was made with .*my_plugs.py:Skip, which is code that no file may start"):
        Run.open(tmp_path / "run").go()
    assert not (tmp_path / "ran").exists()
    heard = []
    Run.open(tmp_path / "run", ditkit.load(tiny_model, plugs=[f"{mine}:Skip"])).go(listeners=[heard.append])
    assert [event.name for event in heard if event.name == "plug.changed"] == ["plug.changed"]


def test_a_plug_row_of_another_seam_is_said(tmp_path):
    row = PlugRow("odd", "blocks", dict)
    PLUGS.add(row, "a test")
    with pytest.raises(SetupError, match=r"the plug 'odd': its seam is 'blocks' \(did you mean 'run_blocks'\?\)"):
        plugs_of(["odd"])
