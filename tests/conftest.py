import numpy as np, pytest, torch
from PIL import Image
from fusion_notebooks import demo
from fusion_notebooks.mllm import MLLM, Sample



def randomise(model, seed=0):
    "Weights large enough that the image, every layer and every norm matter"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1: p.copy_(1 + .3*torch.randn(p.shape, generator=g) if 'norm' in name and 'bias' not in name else .1*torch.randn(p.shape, generator=g))
            else: p.copy_(torch.randn(p.shape, generator=g)*1.5/p[0].numel()**.5)
    return model

def noise_image(seed, size=(384, 384)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1]//8, size[0]//8, 3), dtype='uint8')).resize(size)

@pytest.fixture(scope='session')
def tiny():
    model, processor = demo.make_model()
    return MLLM(randomise(model), processor, 'tiny')

@pytest.fixture(scope='session')
def samples():
    asks = ('What color is the circle?', 'Which digit is on the red object?', 'Name the shape of the object at the top left.')
    return [Sample(noise_image(k), q, ('red',), (0, 0, 96, 96), 'fine', f's{k}') for k, q in enumerate(asks)]
