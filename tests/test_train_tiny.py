"""How the tiny checkpoint is taught: its sequences are the prompts that garserve makes, its answers are true."""

import re
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from garserve.checkpoint import Checkpoint, expected_tensors
from garserve.inputs.processor import Processor
from garserve.inputs.request import RegionRequest, Turn
from garserve.model.random_checkpoint import write_files, write_random_checkpoint
from garserve.model.reference import ReferenceGAR
from garserve.presets import preset
from tests.train_tiny import training_module

pictures, questions, sequences, batches = (
    training_module(name) for name in ("pictures", "questions", "sequences", "batches")
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The files that training starts from, with random weights."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny")
    config, preprocessor = preset("tiny")
    write_files(folder, config | {"replay_box_scale": "geometric"}, preprocessor, questions.vocabulary())
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def maker(checkpoint: Checkpoint) -> object:
    return sequences.ExampleMaker(checkpoint.folder, checkpoint.config)


@pytest.fixture(scope="module")
def shown() -> object:
    image = np.full((120, 160, 3), (200, 200, 190), np.uint8)
    masks = []
    boxes = ((10, 10, 50, 60), (90, 20, 150, 50), (60, 70, 75, 110))
    for (x1, y1, x2, y2), colour in zip(boxes, ((200, 20, 20), (20, 40, 210), (10, 130, 20)), strict=True):
        image[y1:y2, x1:x2] = colour
        mask = np.zeros((120, 160), bool)
        mask[y1:y2, x1:x2] = True
        masks.append(mask)
    return pictures.Picture(image, masks)


def prompts(processor: Processor, example: object, request: RegionRequest) -> list[tuple[list[list[int]], list[int]]]:
    """For each branch of an example: the prompts that garserve makes of its last question, and the branch's tokens.

    There are two prompts, with the usual text of the system and without; the example has one of them.
    """
    ids, branch = example.ids.tolist(), example.branch.tolist()
    pairs = []
    for number, turns in enumerate(example.branches, start=1):
        tokens = [token for token, owner in zip(ids, branch, strict=True) if owner in (0, number)]
        said: list[Turn] = []
        for earlier, later in pairwise(turns):
            said += [Turn("assistant", earlier.answer), Turn("user", later.text)]
        asked = replace(request, question=turns[0].text, turns=said, check_names=False)
        pairs.append(([processor(replace(asked, system=system)).token_ids for system in (None, "")], tokens))
    return pairs


def test_sequences_are_the_prompts_that_garserve_makes(checkpoint: Checkpoint, maker: object, shown: object) -> None:
    processor = Processor(checkpoint.folder, checkpoint.config)
    known = questions.Known.of(shown)
    longest = 0
    for seed in range(12):
        example = maker.multi(known, np.random.default_rng(seed))
        crops = checkpoint.config.crop_token_ids
        listed = [crops.index(token) for token in dict.fromkeys(example.ids.tolist()) if token in crops]
        request = RegionRequest(shown.image, shown.masks, focus=listed)
        for turns, (possible, tokens) in zip(example.branches, prompts(processor, example, request), strict=True):
            end = [*maker.tokenizer.encode(turns[-1].answer), maker.end]
            assert tokens in [prompt + end for prompt in possible]
            longest = max(longest, len(turns))
    assert longest == 3


def test_single_region_form_with_turns(checkpoint: Checkpoint, maker: object, shown: object) -> None:
    processor = Processor(checkpoint.folder, checkpoint.config)
    for seed in range(6):
        known = questions.Known.of(pictures.Picture(shown.image, shown.masks[seed % 3 : seed % 3 + 1]))
        example = maker.single(known, np.random.default_rng(seed))
        number = next(k for k, token in enumerate(checkpoint.config.crop_token_ids) if token in example.ids.tolist())
        request = RegionRequest(shown.image, known.picture.masks, prompt_index=number)
        ((possible, tokens),) = prompts(processor, example, request)
        end = [*maker.tokenizer.encode(example.asked[-1].answer), maker.end]
        assert tokens in [prompt + end for prompt in possible]


def test_packed_training_is_the_reference(checkpoint: Checkpoint, maker: object, shown: object) -> None:
    """The first logits of every branch of one packed pass are those of the reference for that request alone."""
    network = training_module("network")
    model = network.TrainedGAR(checkpoint.config).eval()
    reference = ReferenceGAR.load(checkpoint)
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(network.HEADS) for name in missing)
    processor = Processor(checkpoint.folder, checkpoint.config)
    known = questions.Known.of(shown)
    example = next(
        one
        for one in (maker.multi(known, np.random.default_rng(seed)) for seed in range(50))
        if len(one.down) == 3 and max(map(len, one.branches)) == 1
    )
    ((usual, _), tokens) = prompts(processor, example, RegionRequest(shown.image, shown.masks))[0]
    system = None if tokens[: len(usual)] == usual else ""
    requests = [
        RegionRequest(shown.image, shown.masks, one.text, system=system, check_names=False) for one in example.asked
    ]
    _, expected = reference.generate([processor(one) for one in requests], [1] * len(requests), maker.end)
    batch = batches.collate([example])
    with torch.inference_mode():
        hidden = model._decode(batch, *model._encode(batch))
        answers = batch.answers[0].bool()
        before = (answers[1:] & ~answers[:-1]).nonzero()[:, 0]
        logits = model.language_model.lm_head(model._last(batch, hidden, torch.zeros_like(before), before))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_branches_lie_in_rows_whole_and_see_only_their_prefix(maker: object, shown: object) -> None:
    known = questions.Known.of(shown)
    examples = [maker.multi(known, np.random.default_rng(seed)) for seed in range(4)]
    examples.append(maker.single(known, np.random.default_rng(9)))
    batch = batches.collate(examples)
    columns = batch.ids.shape[1] - batch.prefix
    assert columns % batch.row == 0
    assert columns < max(_rows_of(one, 128) for one in examples) * 128  # narrower or wider rows: less padding
    for number, one in enumerate(examples):
        kept = batch.branch[number] >= 0
        assert batch.ids[number, kept].tolist() == one.ids.tolist()
        assert batch.answers[number, kept].bool().tolist() == one.answers.tolist()
        assert batch.positions[number, kept].tolist() == one.positions.tolist()
        columns = kept.nonzero()[:, 0]
        for branch in range(1, len(one.branches) + 1):
            places = columns[one.branch == branch]
            assert len({(int(place) - batch.prefix) // batch.row for place in places}) == 1
            assert places.diff().eq(1).all()
    seen = training_module("attention").seen_by_rows(batch)
    row, column = (
        int(i[0]) for i in (batch.branch[0, batch.prefix :].unflatten(0, (-1, batch.row)) == 2).nonzero(as_tuple=True)
    )
    owners = torch.cat(
        [batch.branch[0, : batch.prefix], batch.branch[0, batch.prefix :].unflatten(0, (-1, batch.row))[row]]
    )
    assert set(owners[seen[0, row, column]].tolist()) == {0, 2}
    assert int(seen[0, row, column].sum()) == int((examples[0].branch == 0).sum()) + 1  # the prefix and itself


def _rows_of(example: object, width: int) -> int:
    rows, free = 1, width
    for length in example.branch.bincount().tolist()[1:]:
        rows, free = (rows + 1, width - length) if length > free else (rows, free - length)
    return rows


def test_answers_are_taught_to_look_at_the_names_in_their_questions(maker: object, shown: object) -> None:
    known = questions.Known.of(shown)
    examples = [maker.multi(known, np.random.default_rng(seed)) for seed in range(8)]
    batch = batches.collate(examples)
    found = training_module("hints").compared(batch).tolist()
    assert len({(row, column) for row, column, *_ in found}) == len(found)
    written = 0
    for row, example in enumerate(examples):
        of_row = [one for one in found if one[0] == row]
        listed = {f"<Prompt{number}>" for number in example.numbers.tolist()}
        for asked in example.asked:
            names = [word for word in re.findall(r"<Prompt\d>", asked.text) if word in listed]
            count = len(maker.tokenizer.encode(asked.answer)) + 1 if names else 0
            some, of_row = of_row[:count], of_row[count:]
            written += count
            for _, column, first, last, *regions in some:
                assert batch.answers[row, column + 1]
                pair = [maker.tokenizer.decode([int(batch.ids[row, place])]) for place in (first, last)]
                assert pair == [names[0], names[-1]]
                assert batch.names[regions].tolist() == batch.ids[row, [first, last]].tolist()
        assert not of_row
    assert written > 100


def test_attention_is_taught_to_be_even(checkpoint: Checkpoint, maker: object, shown: object) -> None:
    """Attention that is even over a token's past costs nothing where all of it is wanted, and log 2 where half is."""
    batch = batches.collate([maker.multi(questions.Known.of(shown), np.random.default_rng(0))])
    decoder = training_module("network").TrainedGAR(checkpoint.config).language_model.model
    with torch.no_grad():
        decoder.layers[1].self_attn.q_proj.weight.zero_()
    hidden = tuple(torch.randn(*batch.ids.shape, decoder.config.hidden_size) for _ in range(2))
    columns = torch.tensor([9, 19])
    past = torch.arange(batch.ids.shape[1]) <= columns[:, None]
    loss = training_module("hints").attention_loss
    queries = (torch.zeros(2, dtype=torch.long), columns)
    torch.testing.assert_close(loss(decoder, 1, batch, hidden, queries, past), torch.tensor(0.0))
    half = past & (torch.arange(batch.ids.shape[1]) % 2 == 0)
    torch.testing.assert_close(loss(decoder, 1, batch, hidden, queries, half), torch.tensor(2.0).log())
    both = torch.stack([past, half], dim=1)  # each group of heads its own
    torch.testing.assert_close(loss(decoder, 1, batch, hidden, queries, both), torch.tensor(2.0).log() / 2)


@pytest.fixture
def cores() -> Iterator[Executor]:
    with training_module("train").one_threaded(2) as pool:
        yield pool


def test_parts_learnt_side_by_side_are_the_batch(
    checkpoint: Checkpoint, maker: object, shown: object, cores: Executor
) -> None:
    """The gradients of parts in threads of their own are those of one part after another."""
    train = training_module("train")
    known = questions.Known.of(shown)
    parts = batches.collate_by_length([maker.multi(known, np.random.default_rng(seed)) for seed in range(8)], 2)
    models, rows = [], []
    with ThreadPoolExecutor(1) as single:
        for pool in (single, cores):
            torch.manual_seed(0)
            models.append(training_module("network").TrainedGAR(checkpoint.config))
            rows.append(train.train_step(models[-1], [], parts, 1e-3, pool, decoder=True, frozen=False))
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_every_hint_and_answer_can_be_learnt(
    checkpoint: Checkpoint, maker: object, shown: object, cores: Executor
) -> None:
    """A few steps on one batch lower every loss; a frozen tower stays as it is."""
    train = training_module("train")
    torch.manual_seed(0)
    model = training_module("network").TrainedGAR(checkpoint.config)
    optimizers = train._optimizers(model, 1e-3)
    known = questions.Known.of(shown)
    parts = batches.collate_by_length([maker.multi(known, np.random.default_rng(seed)) for seed in (1, 2)], 2)
    weight = model.encoder.tower.blocks[0].attn.qkv.weight
    before = weight.detach().clone()
    rows = [train.train_step(model, optimizers, parts, 1e-3, cores, decoder=True, frozen=True) for _ in range(6)]
    assert torch.equal(weight, before)
    assert rows[-1]["answers"] < rows[0]["answers"] - 1
    assert rows[-1]["hints"] < rows[0]["hints"] - 1
    optimizers = train._optimizers(model, 1e-3)
    rows = [train.train_step(model, optimizers, parts, 3e-4, cores, decoder=False, frozen=False) for _ in range(8)]
    assert not torch.equal(weight, before)
    assert rows[-1]["hints"] < rows[0]["hints"]
    assert rows[-1]["answers"] == 0


def test_training_goes_on_where_it_stopped(
    checkpoint: Checkpoint, maker: object, shown: object, cores: Executor, tmp_path: Path
) -> None:
    train, saved = training_module("train"), training_module("saved")
    known = questions.Known.of(shown)
    parts = batches.collate_by_length([maker.multi(known, np.random.default_rng(4))], 1)

    def fresh(seed: int) -> tuple:
        torch.manual_seed(seed)
        model = training_module("network").TrainedGAR(checkpoint.config)
        return model, train._optimizers(model, 1e-3)

    model, optimizers = fresh(0)
    train.train_step(model, optimizers, parts, 1e-3, cores, decoder=True, frozen=False)
    saved.save(tmp_path, model, optimizers, 1, {"rate": 1e-3})
    resumed, others = fresh(1)
    with pytest.raises(SystemExit, match="expected the settings that it was begun with"):
        saved.resume(tmp_path, resumed, others, {"rate": 2e-3})
    assert saved.resume(tmp_path, resumed, others, {"rate": 1e-3}) == 1
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(optimizers, others, strict=True):
        saved, loaded = one.state_dict()["state"], other.state_dict()["state"]
        assert saved.keys() == loaded.keys()
        for index, values in saved.items():
            assert values.keys() == loaded[index].keys()
            assert all(torch.equal(torch.as_tensor(values[key]), loaded[index][key]) for key in values)
    after = train.train_step(model, optimizers, parts, 1e-3, cores, decoder=True, frozen=False)
    again = train.train_step(resumed, others, parts, 1e-3, cores, decoder=True, frozen=False)
    assert again == pytest.approx(after, rel=1e-3, nan_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected_tensors(checkpoint.config)
    assert (tmp_path / "model.safetensors").stat().st_size <= 12_000_000
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"], "weights, and nothing else"


def test_the_mean_of_two_checkpoints(checkpoint: Checkpoint, mini: Path, tmp_path: Path) -> None:
    mean = training_module("mean").main
    other = write_random_checkpoint(tmp_path / "other", "tiny", seed=5)
    mean(checkpoint.folder, other, tmp_path / "mean", 0.75)
    between = Checkpoint.open(tmp_path / "mean").module_state()
    first, second = checkpoint.module_state(), Checkpoint.open(other).module_state()
    for name, tensor in between.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])
    assert not all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SystemExit, match="expected weights of the names and shapes of"):
        mean(checkpoint.folder, mini, tmp_path / "mean", 0.5)


def test_questions_are_true(shown: object) -> None:
    known = questions.Known.of(shown)
    rng = np.random.default_rng(0)
    names = ["<Prompt0>", "<Prompt1>", "<Prompt2>"]
    asked = [one for _ in range(60) for one in questions.questions(known, range(3), names, 8, rng)]
    by_text = {one.text: one.answer for one in asked}
    assert by_text["What colour is <Prompt0>?"] == "<Prompt0> is red."
    assert by_text["Where is <Prompt0>?"] == "<Prompt0> is at the top left of the image."
    assert by_text["Where is <Prompt0> relative to <Prompt1>?"] == "<Prompt0> is left of <Prompt1>."
    which = [one for one in asked if one.form == "which"]
    truth = {"smallest": "<Prompt2>", **dict(zip(("red", "blue", "green"), names, strict=True))}
    assert {one.answer.split()[-1].rstrip(".") for one in which} == set(truth)
    for one in which:
        what = one.answer[13:-1]
        assert one.answer == f"{truth[what.split()[-1]]} is {what}."
        assert re.fullmatch(rf"Which (region )?is {what}, <Prompt\d>, <Prompt\d> or <Prompt\d>\?", one.text)
        assert set(names) <= set(re.findall(r"<Prompt\d>", one.text))
        assert one.text[slice(*one.named)] == " " + one.answer[:9]
    assert by_text["Is <Prompt1> larger than <Prompt2>?"] == "Yes."
    not_given = [one for one in asked if one.form == "not given"]
    assert {one.answer for one in not_given} == {"<Prompt3> was not given.", "<Prompt4> was not given."}
    assert all(one.answer[:9] in one.text for one in not_given)
    choices = [one for one in asked if one.form == "choice" and one.attribute == "colour"]
    assert len(choices) > 5
    for one in choices:
        option = next(line for line in one.text.splitlines() if line.startswith(f"{one.answer}. "))
        region = next(name for name in names if name in one.text)
        assert option[3:] == dict(zip(names, ("red", "blue", "green"), strict=True))[region]
    for one in asked:
        if one.form == "yes/no" and one.attribute == "colour":
            region, word = one.text[3:12], one.text[13:-1]
            assert one.answer == (
                "Yes." if (region, word) in zip(names, ("red", "blue", "green"), strict=True) else "No."
            )


def test_a_step_of_muon_is_an_orthogonal_matrix() -> None:
    muon = training_module("muon")
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        gradient = torch.randn(shape, generator=generator)
        ours = muon.orthogonal(gradient)
        values = torch.linalg.svdvals(ours)
        assert values.min() > 0.6
        assert values.max() < 1.3
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(ours.flatten(), (left @ right).flatten(), dim=0) > 0.97
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = gradient
        muon.Muon([weight], lr=0.1).step()
        torch.testing.assert_close(weight.detach(), -0.1 * 0.2 * 40**0.5 * ours, rtol=1e-4, atol=1e-6)


def test_phases_follow_one_another_and_the_rate_ends_near_nothing() -> None:
    plan = training_module("schedule").Schedule(300, 0, 100, 50, 40)
    phases = [plan.phase(step) for step in range(300)]
    assert phases == ["tower"] * 100 + ["decoder"] * 50 + ["all"] * 150
    assert plan.rate(0) == 0.01
    assert plan.rate(100) == pytest.approx(0.007)
    assert max(map(plan.rate, range(300))) <= 1
    assert plan.rate(259) == pytest.approx(0.007)
    assert [plan.has_groups(step) for step in (259, 260, 299)] == [False, True, True]
    assert 0.08 < max(plan.rate(step) for step in range(260, 300)) < 0.15
    assert plan.rate(299) == pytest.approx(0.15 / 40)
    further = plan.further(1000)
    assert [further.phase(step) for step in (0, 59, 60, 999)] == ["heads", "heads", "all", "all"]
    assert [round(further.rate(step), 3) for step in (59, 60, 999)] == [1.0, 0.007, 0.007]
    assert not further.has_groups(999)
    with pytest.raises(SystemExit, match="steps: expected at least the 190 of the phases, got 189"):
        training_module("schedule").Schedule(189, 0, 100, 50, 40)


def test_a_checkpoint_is_taught_further_from_its_own_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    train, network = training_module("train"), training_module("network")
    torch.manual_seed(3)
    model = network.TrainedGAR(checkpoint.config)
    train._begin_with(model, checkpoint.folder, tmp_path)
    weights = model.state_dict()
    for name, tensor in checkpoint.module_state().items():
        assert torch.equal(weights[name], tensor.float()), name
    assert (tmp_path / "tokenizer.json").read_bytes() == (checkpoint.folder / "tokenizer.json").read_bytes()
    other = write_random_checkpoint(tmp_path / "mini")
    with pytest.raises(SystemExit, match="expected a checkpoint with the config of the preset tiny"):
        train._begin_with(model, other, tmp_path)


def test_no_question_about_a_part_of_the_truth(shown: object) -> None:
    """What is at the top left is at the top, too; what lies inside also shares pixels: neither is asked."""
    inner = np.zeros((120, 160), bool)
    inner[20:40, 20:40] = True
    known = questions.Known.of(pictures.Picture(shown.image, [shown.masks[0], inner]))
    rng = np.random.default_rng(1)
    drawn = [questions.questions(known, range(2), ["<Prompt0>", "<Prompt1>"], 8, rng) for _ in range(60)]
    texts = {one.text for asked in drawn for one in asked}
    assert "Is <Prompt0> at the bottom right of the image?" in texts
    assert not texts & {"Is <Prompt0> at the top of the image?", "Is <Prompt0> at the left of the image?"}
    assert "Is <Prompt1> around <Prompt0>?" in texts
    assert "Is <Prompt1> overlapping <Prompt0>?" not in texts


def test_the_last_examples_describe_each_of_many_regions(
    maker: object, shown: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "picture", lambda rng: shown)
    train = training_module("train")
    last = train.Examples(maker, 0, 8, 4)
    monkeypatch.setattr(type(maker), "__call__", lambda self, seed: seed)
    assert [last[index] for index in (0, 1, 2, 3, 5, 7)] == [(1, index) for index in (0, 1, 2, 3, 5, 7)]
    counts = set()
    for index in (4, 6):
        described = [one.text for (one,) in last[index].branches if one.form == "describe"]
        counts.add(len(last[index].numbers))
        assert last[index].numbers.tolist() == list(range(len(last[index].numbers)))
        for number in last[index].numbers.tolist():
            assert any(f"<Prompt{number}>" in text for text in described)
    assert max(counts) > 3, "more than the picture has of its own"
    drawn = pictures.crowded(np.random.default_rng(3)).masks
    assert len(drawn) <= 5
    assert np.sum(drawn, axis=0).max() == 1, "none lies over another"


def test_the_same_seed_gives_the_same_example(maker: object, shown: object) -> None:
    def make(rng: np.random.Generator) -> object:
        return pictures.Picture(shown.image, [shown.masks[i] for i in rng.permutation(3)])

    first, second = maker((1, 5), make), maker((1, 5), make)
    assert first.ids.tolist() == second.ids.tolist()
    assert torch.equal(first.tile, second.tile)
    assert maker((1, 6), make).ids.tolist() != first.ids.tolist()
