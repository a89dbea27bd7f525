// Training on AVX2.
#include "training_kernels.h"

const edgellm::TrainingSet edgellm::kTrainingAvx2 = {"AVX2", training_kernels<float>(), training_kernels<uint16_t>()};
