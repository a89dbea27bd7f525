"""Fine-tuning of sparse LoRA adapters on the device: data, jobs, and the trainer, whose modules need torch."""
