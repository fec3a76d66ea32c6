import torch

from training.conditioning import make_time_ids, predict, trained_parameters
from training.models.unet import load_pipeline_parts


def test_time_ids_of_a_hand_worked_picture():
    # A photograph of 3000 x 4000 (height x width) shrunk by 0.224 to 672 x 896 for the bucket 640 x 896:
    # 32 rows of slack, of which 11 lie above the crop.
    ids = make_time_ids(torch.tensor([[3000.0, 4000.0]]), torch.tensor([[11.0, 0.0]]), torch.tensor([[640.0, 896.0]]))
    assert ids.tolist() == [[3000, 4000, 11, 0, 640, 896]]
    assert ids.dtype == torch.float32


def test_time_ids_are_the_pipelines(tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    theirs = pipeline._get_add_time_ids(
        (3000, 4000), (11, 7), (640, 896), dtype=torch.float32,
        text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
    )  # fmt: skip
    ours = make_time_ids(*(torch.tensor([pair]) for pair in ((3000, 4000), (11, 7), (640, 896))))
    assert torch.equal(ours, theirs)


def test_prediction_is_the_librarys_with_the_pipelines_own_text_encoding(tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    prompt = ["a b c", ""]
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    noised, steps = torch.randn(2, 4, 4, 6), torch.tensor([3, 900])
    time_ids = torch.tensor([[64.0, 80, 0, 8, 32, 48]] * 2)
    theirs = pipeline.unet(
        noised, steps, encoder_hidden_states=embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
    ).sample
    ids = [
        tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids[:, None]
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    torch.testing.assert_close(predict(parts, noised, steps, ids, time_ids), theirs)
    moved = predict(parts, noised, steps, ids, time_ids + torch.tensor([0, 0, 5.0, 0, 0, 0]))
    assert not torch.allclose(moved, theirs)


def test_every_trained_parameter_gets_a_gradient_and_no_other_wants_one(tiny_sdxl):
    parts = load_pipeline_parts(tiny_sdxl, "cpu")
    trained = trained_parameters(parts, text_encoder=True, text_encoder_2=True)
    ids = [torch.full((2, 1, 77), 5)] * 2
    predict(parts, torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), ids, torch.ones(2, 6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    wanting = {
        id(parameter)
        for module in (parts.unet, parts.vae, *parts.text_encoders)
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    assert wanting == {id(parameter) for parameter in trained.values()}
