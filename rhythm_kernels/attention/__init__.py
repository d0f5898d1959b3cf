from rhythm_kernels.attention.api import attention_stats

__all__ = ["attention_stats"]
