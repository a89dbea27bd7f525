"""On-device fine-tuning: data sets, jobs and uploaded files. Nothing in here needs torch but the trainer."""
