// Training on AVX-512.
#include "training_kernels.h"

const edgellm::TrainingSet edgellm::kTrainingAvx512 = {"AVX-512", training_kernels<float>(), training_kernels<uint16_t>()};
