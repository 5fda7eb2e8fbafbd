"""Fine-tune torchvision's ResNet-50 on scikit-learn's digits: python -m runners.examples.finetune_resnet50."""

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from tqdm import trange

import blpa

STEPS, BATCH, SIZE = 60, 32, 64
device = "cuda" if torch.cuda.is_available() else "cpu"

images, labels = (torch.as_tensor(array, device=device) for array in load_digits(return_X_y=True))
images = F.interpolate(images.float().view(-1, 1, 8, 8) / 16, size=SIZE).expand(-1, 3, -1, -1)
test, train = torch.randperm(len(images), device=device).split([360, len(images) - 360])
try:
    model = torchvision.models.resnet50(weights="DEFAULT")
except OSError as error:
    print(f"random weights, since there is no network ({error})")
    model = torchvision.models.resnet50(weights=None)
model.fc = torch.nn.Linear(model.fc.in_features, 10)
model.to(device)
print(blpa.explain(model, images[:BATCH], bits=4))  # what it saves, and what it would save converted
blpa.convert(model, bits=4)
print(blpa.gradient_error(model, images[:BATCH], loss=lambda logits: F.cross_entropy(logits, labels[:BATCH])))

optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for _ in trange(STEPS, desc="training"):
    batch = train[torch.randint(len(train), (BATCH,), device=device)]
    F.cross_entropy(model(images[batch]), labels[batch]).backward()
    optimiser.step()
    optimiser.zero_grad()

print(blpa.explain(model, images[:BATCH]))  # as converted
blpa.restore(model).eval()  # PyTorch's own classes again
with torch.no_grad():
    right = torch.cat([model(images[part]).argmax(1) == labels[part] for part in test.split(BATCH)])
print(f"test error {100 * (1 - right.float().mean()):.1f} %")
