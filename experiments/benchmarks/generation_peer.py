"""The side of transformers in generation.py, run by `peer.py` under the interpreter that has it and torch."""

import time


def handlers() -> dict:
    import torch
    import transformers

    case = {}

    def load(directory, threads):
        torch.set_num_threads(threads)
        case["model"] = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def prepare(tokens, new, temperature):
        ids = torch.tensor(tokens)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

        @torch.inference_mode()
        def generate():
            return case["model"].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
                **how,
            )

        def run():
            begun = time.perf_counter()
            generate()
            return time.perf_counter() - begun

        case["run"] = run
        return {"tokens": generate()[:, ids.shape[1] :].tolist()}

    return {
        "load": load,
        "prepare": prepare,
        "run": lambda: case["run"](),
        "versions": lambda: {"transformers": transformers.__version__, "torch": torch.__version__},
    }
