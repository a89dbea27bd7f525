// Training on any processor.
#include "training_kernels.h"

const edgellm::TrainingSet edgellm::kTrainingPortable = {"portable", training_kernels<float>(), training_kernels<uint16_t>()};
