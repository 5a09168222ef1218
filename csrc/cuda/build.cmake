# The CUDA half of the library. nvcc compiles the kernels (*.cu), without torch's headers; the C++ compiler compiles the
# code that registers and launches them (*.cpp).
#
# A unit's name says what it is compiled for: *_sm90a.cu and *_sm100a.cu for that architecture alone, *_sm80.cu for every
# architecture without units of its own, all others for every architecture.

enable_language(CUDA)

# 9.0a -> -gencode=arch=compute_90a,code=sm_90a; with +PTX also code=compute_90a, which the driver compiles.
foreach(ARCHITECTURE IN LISTS FILA_CUDA_ARCHITECTURES)
  string(REGEX MATCH "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$" ARCHITECTURE "${ARCHITECTURE}")
  set(NUMBER "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  set(GENCODE "-gencode=arch=compute_${NUMBER},code=sm_${NUMBER}")
  if(CMAKE_MATCH_3)
    list(APPEND GENCODE "-gencode=arch=compute_${NUMBER},code=compute_${NUMBER}")
  endif()
  list(APPEND GENCODES_all ${GENCODE})
  if(NUMBER MATCHES "^(90a|100a)$")
    list(APPEND GENCODES_sm${NUMBER} ${GENCODE})
  else()
    list(APPEND GENCODES_sm80 ${GENCODE})
  endif()
endforeach()

file(GLOB CUDA_UNITS CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB CUDA_HOST_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cpp)
if(FILA_CUDA_UNITS)
  list(FILTER CUDA_UNITS INCLUDE REGEX "/(${FILA_CUDA_UNITS})[^/]*$")
  list(FILTER CUDA_HOST_SOURCES INCLUDE REGEX "/(${FILA_CUDA_UNITS})[^/]*$")
endif()
set(CUDA_COMPILED "")
foreach(UNIT IN LISTS CUDA_UNITS)
  set(KIND all)
  if(UNIT MATCHES "_(sm80|sm90a|sm100a)\\.cu$")
    set(KIND ${CMAKE_MATCH_1})
  endif()
  if(GENCODES_${KIND})
    list(APPEND CUDA_COMPILED "${UNIT}")
    set_source_files_properties("${UNIT}" PROPERTIES COMPILE_OPTIONS "${GENCODES_${KIND}}")
  endif()
endforeach()

# A pool of its own, since a unit of CUTLASS takes far more memory than any other.
set_property(GLOBAL APPEND PROPERTY JOB_POOLS cuda=${FILA_CUDA_JOBS})
add_library(fila_kernels_cuda OBJECT ${CUDA_COMPILED})
set_target_properties(
  fila_kernels_cuda
  PROPERTIES CUDA_STANDARD 17
             CUDA_STANDARD_REQUIRED ON
             CUDA_ARCHITECTURES OFF # each unit has its own
             CUDA_VISIBILITY_PRESET hidden
             POSITION_INDEPENDENT_CODE ON
             JOB_POOL_COMPILE cuda)
target_compile_options(fila_kernels_cuda PRIVATE --expt-relaxed-constexpr
                                                 -Xcompiler=-Wall,-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=)
target_include_directories(fila_kernels_cuda PRIVATE csrc)
target_include_directories(fila_kernels_cuda SYSTEM PRIVATE "${FILA_CUTLASS_DIR}")

target_sources(fila_kernels PRIVATE ${CUDA_HOST_SOURCES} $<TARGET_OBJECTS:fila_kernels_cuda>)
target_include_directories(fila_kernels SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# FILA_SM80, FILA_SM90A and FILA_SM100A: which units there are.
foreach(KIND sm80 sm90a sm100a)
  if(GENCODES_${KIND})
    string(TOUPPER "FILA_${KIND}" DEFINITION)
    target_compile_definitions(fila_kernels PRIVATE ${DEFINITION})
  endif()
endforeach()
# The runtime is linked in, and its symbols stay inside: one library loads beside any torch, with CUDA or without. What
# the driver has (there may be none) is asked for through the runtime.
set_target_properties(fila_kernels PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_ARCHITECTURES OFF)
target_link_options(fila_kernels PRIVATE LINKER:--exclude-libs,ALL)
target_link_libraries(fila_kernels PRIVATE ${CMAKE_DL_LIBS})
