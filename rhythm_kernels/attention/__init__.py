from rhythm_kernels.attention.api import attention, attention_stats, group_stats

__all__ = ["attention", "attention_stats", "group_stats"]
