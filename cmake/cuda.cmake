# The libraries of the CUDA backend:
#   rapshee_cuda_api  cuda_api.h and gemm.h on CUDA's libraries, or the emulated device
#   rapshee_cuda      kernels and host half
# Neither exists where RAPSHEE_CUDA comes out as OFF. RAPSHEE_WITH_CUDA tells the code above them
# that they do.

file(GLOB RAPSHEE_CUDA_KERNELS CONFIGURE_DEPENDS
  RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}" csrc/backend/cuda/kernels/*.cu)
set(RAPSHEE_CUDA_HOST
  csrc/backend/cuda/cuda_backend.cpp
  csrc/backend/cuda/cuda_backend_step.cpp
  csrc/backend/cuda/cuda_weights.cpp
  csrc/backend/cuda/row_packer.cpp
)
# cp.async and mma of bf16 came with 8.0; its code also runs, compiled by the driver, on devices
# that have none of their own here.
set(RAPSHEE_CUDA_DEFAULT_ARCHITECTURES "80;90a")
set(RAPSHEE_CUDA_MIN_VERSION 13.0)

# Sets `result` to the architectures of the devices here, empty where there is none that the kernels
# run on.
function(rapshee_find_devices result)
  set(${result} "" PARENT_SCOPE)
  find_program(RAPSHEE_NVIDIA_SMI nvidia-smi)
  mark_as_advanced(RAPSHEE_NVIDIA_SMI)
  if(NOT RAPSHEE_NVIDIA_SMI)
    if(EXISTS /dev/nvidia0)
      set(${result} "${RAPSHEE_CUDA_DEFAULT_ARCHITECTURES}" PARENT_SCOPE)
    endif()
    return()
  endif()
  execute_process(
    COMMAND "${RAPSHEE_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capabilities RESULT_VARIABLE status ERROR_QUIET)
  if(NOT status EQUAL 0)
    return()
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
  set(architectures "")
  foreach(capability IN LISTS capabilities)
    string(REPLACE "." "" architecture "${capability}")
    if(architecture EQUAL 90)
      set(architecture 90a)
    endif()
    if(NOT capability VERSION_LESS 8.0)
      list(APPEND architectures ${architecture})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES architectures)
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

# What is built in the end: ON, OFF or EMU.
set(RAPSHEE_CUDA_MODE "${RAPSHEE_CUDA}")
if(RAPSHEE_CUDA STREQUAL "AUTO")
  set(RAPSHEE_CUDA_MODE OFF)
  rapshee_find_devices(architectures)
  if(architectures)
    include(CheckLanguage)
    check_language(CUDA)
  endif()
  if(NOT architectures)
    message(STATUS "CUDA backend: not built, no device of compute capability 8.0 or later here"
      " (RAPSHEE_CUDA=ON builds it anyway)")
  elseif(NOT CMAKE_CUDA_COMPILER)
    message(STATUS "CUDA backend: not built, nvcc not found")
  else()
    set(RAPSHEE_CUDA_MODE ON)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES ${architectures})
    endif()
  endif()
elseif(NOT RAPSHEE_CUDA MATCHES "^(ON|OFF|EMU)$")
  message(FATAL_ERROR "RAPSHEE_CUDA: got '${RAPSHEE_CUDA}', expected AUTO, ON, OFF or EMU")
endif()

if(RAPSHEE_CUDA_MODE STREQUAL "ON")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES ${RAPSHEE_CUDA_DEFAULT_ARCHITECTURES})
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS RAPSHEE_CUDA_MIN_VERSION)
    set(too_old "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old, the kernels need")
    set(too_old "${too_old} ${RAPSHEE_CUDA_MIN_VERSION} or later")
    if(RAPSHEE_CUDA STREQUAL "ON")
      message(FATAL_ERROR "RAPSHEE_CUDA=ON: ${too_old}")
    endif()
    message(STATUS "CUDA backend: not built, ${too_old}")
    set(RAPSHEE_CUDA_MODE OFF)
  endif()
endif()

if(RAPSHEE_CUDA_MODE STREQUAL "ON")
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "CUDA backend: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake knows it from 3.26 on
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  add_library(rapshee_cuda_api STATIC
    csrc/backend/cuda/cuda_api_runtime.cpp
    csrc/backend/cuda/gemm_cublaslt.cpp
  )
  # The runtime opens the driver when it is first used: what is built here also runs without one.
  target_link_libraries(rapshee_cuda_api PUBLIC CUDA::cudart_static ${CMAKE_DL_LIBS})
  target_link_options(rapshee_cuda_api INTERFACE "LINKER:--exclude-libs,libcudart_static.a")
elseif(RAPSHEE_CUDA_MODE STREQUAL "EMU")
  add_library(rapshee_cuda_api STATIC
    tests/emu/block.cpp
    tests/emu/cuda_api_emu.cpp
    tests/emu/fibers.cpp
    tests/emu/gemm_emu.cpp
    tests/emu/memory.cpp
    tests/emu/shared_memory.cpp
    tests/emu/tensor_core.cpp
  )
  target_compile_definitions(rapshee_cuda_api PUBLIC RAPSHEE_EMU)
  target_include_directories(rapshee_cuda_api PUBLIC tests)
  # CUDA C++ without nvcc: the emulator's device.h stands for intrinsics and PTX.
  set_source_files_properties(${RAPSHEE_CUDA_KERNELS} PROPERTIES
    LANGUAGE CXX COMPILE_OPTIONS "-xc++")
endif()

if(NOT RAPSHEE_CUDA_MODE STREQUAL "OFF")
  target_link_libraries(rapshee_cuda_api PUBLIC rapshee_core)
  add_library(rapshee_cuda STATIC ${RAPSHEE_CUDA_KERNELS} ${RAPSHEE_CUDA_HOST})
  target_compile_definitions(rapshee_cuda PUBLIC RAPSHEE_WITH_CUDA)
  target_link_libraries(rapshee_cuda PUBLIC rapshee_cuda_api)
  target_link_libraries(rapshee PUBLIC rapshee_cuda)
  if(RAPSHEE_CUDA_MODE STREQUAL "EMU")
    # Emulated threads are slow enough.
    target_compile_options(rapshee_cuda_api PRIVATE $<$<CONFIG:Debug>:-O2>)
    target_compile_options(rapshee_cuda PRIVATE $<$<CONFIG:Debug>:-O2>)
  else()
    set_target_properties(rapshee_cuda PROPERTIES
      CUDA_STANDARD 20
      CUDA_STANDARD_REQUIRED ON
      CUDA_VISIBILITY_PRESET hidden
      CUDA_RUNTIME_LIBRARY Static
    )
    # No contraction, as on the host: a * b + c rounds alike in every kernel that it is inlined in.
    target_compile_options(rapshee_cuda PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;--expt-relaxed-constexpr;--extended-lambda>")
    if(RAPSHEE_DEV)
      target_compile_options(rapshee_cuda PRIVATE
        "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Wall,-Wextra,-Werror>")
    endif()
  endif()
elseif(RAPSHEE_CUDA_OPS)
  message(FATAL_ERROR "RAPSHEE_CUDA_OPS=ON needs RAPSHEE_CUDA=ON or EMU")
endif()
