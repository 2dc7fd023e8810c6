"Answers that contrastive attention refines, for `model.generate(..., custom_generate=...)`; see README.md"

import torch


def generate(model, processor=None, image=None, question=None, refine='crop-focus', max_new_tokens=None, **kwargs):
    "(1, tokens) the prompt of the plain question, then the refined answer"
    from fusion_notebooks.core.errors import BadInput
    from fusion_notebooks.mllm import MLLM
    from fusion_notebooks.publish import refined_answer

    if processor is None or image is None or not question:
        raise BadInput('Refining looks at the picture twice: give processor=, image= and question= to generate.')
    given = kwargs.get('generation_config')
    asked = (given.to_diff_dict() if given else {}) | kwargs
    plain = dict(do_sample=False, num_beams=1, num_return_sequences=1, assistant_model=None, streamer=None)
    for name, value in plain.items():
        if asked.get(name) not in (None, value) or (asked.get(name) is True):
            raise BadInput(f'Refined answers are greedy and one at a time: leave {name} out.')
    mllm = MLLM(model, processor)
    answer = refined_answer(mllm, image, question, refine, max_new_tokens or 32)
    prompt = mllm.prompt(image, question).inputs['input_ids']
    return torch.cat([prompt, torch.tensor([answer.ids], dtype=prompt.dtype, device=prompt.device)], 1)
