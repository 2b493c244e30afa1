// The part of DLPack 1.x's exchange API that fastopt calls: how the core reads a tensor without
// torch's headers or libraries. Source: dmlc/dlpack, include/dlpack/dlpack.h. The layout of these
// structs is fixed for DLPack's major version 1; the asserts hold this copy to it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt {

constexpr int32_t kDLCPU = 1, kDLCUDA = 2, kDLROCM = 10, kDLOneAPI = 14;
constexpr uint8_t kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5;
constexpr uint32_t kDLMajorVersion = 1;

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// shape and strides count elements; both are owned by the tensor that was read.
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// A tensor of whoever holds this, until they call its deleter.
struct DLManagedTensorVersioned {
  struct {
    uint32_t major, minor;
  } version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor tensor;
};

// What the capsule torch.Tensor.__dlpack_c_exchange_api__ points to.
struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  const DLPackExchangeAPI* older;
  int (*managed_tensor_allocator)(const DLTensor* like, DLManagedTensorVersioned** out,
                                  void* context,
                                  void (*set_error)(void* context, const char* kind,
                                                    const char* message));
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

static_assert(sizeof(DLTensor) == 48 && offsetof(DLTensor, shape) == 24);
static_assert(offsetof(DLTensor, strides) == 32 && offsetof(DLTensor, byte_offset) == 40);
static_assert(sizeof(DLManagedTensorVersioned) == 80);
static_assert(offsetof(DLManagedTensorVersioned, tensor) == 32);
static_assert(offsetof(DLPackExchangeAPI, dltensor_from_py_object_no_sync) == 40);
static_assert(sizeof(DLPackExchangeAPI) == 56);

}  // namespace fastopt
