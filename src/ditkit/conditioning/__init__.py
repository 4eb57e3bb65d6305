"""Pictures and control videos into what conditions a transformer: functions of tensors on the CPU, whose VAE comes in
as a function."""
