"""Options that say how tokens are drawn; what they refuse stands with the commands that take them."""

from transformers import GenerationConfig

from fastweights.cli.sampling import sampling_settings


def test_settings_are_the_users_then_the_models_then_ours():
    nothing = dict.fromkeys(("temperature", "top_k", "top_p", "repetition_penalty"))
    ours = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    found = sampling_settings(GenerationConfig(), nothing, max_new_tokens=9)
    assert found.items() >= (ours | {"do_sample": True, "num_beams": 1, "max_new_tokens": 9}).items()
    theirs = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    found = sampling_settings(theirs, nothing | {"top_k": 5}, max_new_tokens=9)
    assert found.items() >= {"temperature": 0.6, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.0}.items()
    unsaid = sampling_settings(GenerationConfig(do_sample=True), nothing, max_new_tokens=9)  # as transformers has it
    assert unsaid.items() >= {"temperature": 1.0, "top_p": None, "top_k": 50, "repetition_penalty": 1.0}.items()
    greedy = {"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "do_sample": False}
    assert sampling_settings(theirs, nothing | {"temperature": 0.0}, max_new_tokens=9).items() >= greedy.items()
    assert sampling_settings(GenerationConfig(), nothing, max_new_tokens=9, beams=2).items() >= greedy.items()
    assert sampling_settings(GenerationConfig(), nothing | {"temperature": 1.0}, max_new_tokens=9, beams=2)["do_sample"]
    assert (
        sampling_settings(GenerationConfig(repetition_penalty=1.3), nothing, max_new_tokens=9)["repetition_penalty"]
        == 1.3
    )
