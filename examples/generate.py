"""Ask an exported model with transformers alone; nothing of rlfr_vlm is imported.

    python examples/generate.py MODEL ROWS.jsonl [N]

The rows are the tutorial's: a question with <image> marks, and pictures beside the file.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(model_folder: str, rows: str, count: int = 10) -> None:
    """Print question, response and gold answer of the first rows."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    processor = AutoProcessor.from_pretrained(model_folder)
    for line in Path(rows).read_text().splitlines()[:count]:
        row = json.loads(line)
        question = row["prompt"].replace("<image>", "")
        content = [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [Image.open(Path(rows).parent / name) for name in row["images"]]
        inputs = processor(text=[prompt], images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        response = processor.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        print(f"{question}  {response}  (gold: {row['answer']})")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
