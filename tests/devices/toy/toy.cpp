// A toy accelerator for tests: its memory is the host's, its kernels are the CPU's, and it has graphs.
//
// While a stream captures, operators are recorded and not run, as on a device; what shape a result has, torch's meta
// kernels say. A replay runs what was recorded over the same memory.

#include <ATen/EmptyTensor.h>
#include <ATen/core/GraphImplInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <functional>
#include <vector>

namespace {

constexpr auto TOY = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(TOY, 0);

c10::StreamId current_stream = 0;
c10::StreamId streams = 0;
size_t bytes_used = 0;

using Work = std::function<void()>;
std::vector<Work>* capturing = nullptr;

// What the device does is its own affair: Python's dispatch modes do not see it.
struct Unseen {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::python_ks};
};

// Runs `work` now, or where a stream captures, writes it down.
void submit(Work work) {
  const Unseen unseen;
  if (capturing != nullptr) {
    capturing->push_back(std::move(work));
  } else {
    work();
  }
}

struct ToyAllocator final : c10::DeviceAllocator {
  static void release(void* pointer) {
    free(pointer);
  }
  c10::DataPtr allocate(size_t nbytes) override {
    void* data = nbytes == 0 ? nullptr : malloc(nbytes);
    bytes_used += nbytes;
    return {data, data, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* target, const void* source, size_t count) const override {
    default_copy_data(target, source, count);
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    return {};
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const size_t total = size_t(1) << 40;
    return {total - bytes_used, total};
  }
};

ToyAllocator allocator;
REGISTER_ALLOCATOR(TOY, &allocator);

struct ToyGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return TOY;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return kDevice;
  }
  c10::Device getDevice() const override {
    return kDevice;
  }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, current_stream);
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, 0);
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, ++streams);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = current_stream;
    current_stream = stream.id();
    return c10::Stream(c10::Stream::UNSAFE, kDevice, before);
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = this_event();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {
    TORCH_CHECK(capturing == nullptr, "toy: synchronize while a stream captures");
  }

 private:
  static void* this_event() {
    static int event;
    return &event;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, ToyGuard);

struct ToyHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
};

struct ToyGraph final : at::GraphImplInterface {
  explicit ToyGraph(const at::GraphImplArgs& = {}) {}
  void capture_begin(at::MempoolId_t, at::GraphCaptureMode) override {
    TORCH_CHECK(current_stream != 0, "toy: capture must be on a stream that is not the default one");
    TORCH_CHECK(capturing == nullptr, "toy: a capture is under way");
    capturing = &work_;
  }
  void capture_end() override {
    TORCH_CHECK(capturing == &work_, "toy: this graph does not capture");
    capturing = nullptr;
  }
  void instantiate() override {}
  void replay() override {
    TORCH_CHECK(capturing == nullptr, "toy: replay while a stream captures");
    const Unseen unseen;
    for (const auto& work : work_) {
      work();
    }
  }
  void reset() override {
    work_.clear();
  }
  at::MempoolId_t pool() const override {
    return {7, 0};
  }
  void enable_debug_mode() override {}
  void debug_dump(const std::string&) override {}

 private:
  std::vector<Work> work_;
};

at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.device().is_cpu()) {
    return tensor;
  }
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU).requires_grad(false));
}

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

void give_shape(const at::Tensor& tensor, at::IntArrayRef sizes) {
  if (tensor.sizes() != sizes) {
    const auto fresh = at::detail::empty_generic(sizes, &allocator, kKeys, tensor.scalar_type(), std::nullopt);
    tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool) {
  submit([self, target] { on_cpu(target).copy_(on_cpu(self)); });
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  give_shape(target, self.sizes());
  return copy_from(self, target, false);
}

at::Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(
    const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor view(const at::Tensor& self, at::IntArrayRef size) {
  return at::native::view(self, size);
}

at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::as_strided_tensorimpl(self, size, stride, std::nullopt);
}

c10::IValue on_meta(const c10::IValue& value) {
  const auto convert = [](const at::Tensor& tensor) {
    return tensor.defined() ? at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta))
                            : tensor;
  };
  if (value.isTensor()) {
    return convert(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      list.push_back(convert(tensor));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor.has_value() ? std::optional<at::Tensor>(convert(*tensor)) : std::nullopt);
    }
    return list;
  }
  return value.isDevice() ? c10::IValue(c10::Device(at::kMeta)) : value;
}

// Every other operator: the CPU's.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Unseen unseen;
  if (capturing == nullptr) {
    at::native::cpu_fallback(op, stack);
    return;
  }
  const auto& schema = op.schema();
  const torch::jit::Stack arguments(stack->end() - schema.arguments().size(), stack->end());
  torch::jit::drop(*stack, schema.arguments().size());
  torch::jit::Stack shapes;
  for (const auto& argument : arguments) {
    shapes.push_back(on_meta(argument));
  }
  op.callBoxed(&shapes);
  torch::jit::Stack results;
  for (size_t index = 0; index < schema.returns().size(); ++index) {
    const auto* alias = schema.returns()[index].alias_info();
    if (alias == nullptr) {
      TORCH_CHECK(shapes[index].isTensor(), "toy: ", op.operator_name(), " does not return tensors");
      const auto shape = shapes[index].toTensor();
      results.emplace_back(
          at::detail::empty_strided_generic(shape.sizes(), shape.strides(), &allocator, kKeys, shape.scalar_type()));
      continue;
    }
    for (size_t position = 0; position < arguments.size(); ++position) {
      const auto* given = schema.arguments()[position].alias_info();
      if (given != nullptr && *given == *alias) {
        give_shape(arguments[position].toTensor(), shapes[index].toTensor().sizes());
        results.push_back(arguments[position]);
      }
    }
  }
  stack->insert(stack->end(), results.begin(), results.end());
  capturing->push_back([op, arguments, results] {
    auto again = arguments;
    at::native::cpu_fallback(op, &again);
    for (size_t index = 0; index < results.size(); ++index) {
      if (!results[index].toTensor().is_same(again[index].toTensor())) {
        on_cpu(results[index].toTensor()).copy_(on_cpu(again[index].toTensor()));
      }
    }
  });
}

}  // namespace

namespace at {
REGISTER_GRAPH_IMPL(TOY, ToyGraph)
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  at::RegisterPrivateUse1HooksInterface(new ToyHooks);
}
