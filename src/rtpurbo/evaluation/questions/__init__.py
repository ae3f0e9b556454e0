"""Question suites that run offline from files: GSM8K, MATH, MMLU-Pro, HumanEval and BABILong."""
