"""Pruning vs Quantization: which is better? The study of Kuzmin et al. (NeurIPS 2023,
arXiv 2307.02973) on the toolkit's own modules. At equal size, b-bit weights against FP16 weights of
sparsity 1 − b/16, which loses less: on weight tensors, on layer outputs, after fine-tuning?

| script                          | question                                          |
|---------------------------------|---------------------------------------------------|
| expected_sqnr                   | distributions: closed-form expected errors        |
| quant_pruning_weights_sqnr      | every weight tensor of the model zoo              |
| plot_weights_sqnr               | draws the above                                   |
| post_training_quant_acts_sqnr   | layer outputs: bounds and optima of quantisation  |
| post_training_pruning_acts_sqnr | the same of pruning                               |
| main train-compressed           | fine-tuning, quantised or pruned                  |
| report                          | one page of everything that has been run          |
"""

import obc.toolkit.starting  # noqa: F401
