# libnearep, shared and static, from the folders' objects.
set(objects)
foreach(folder nep_base nep_transport nep_placement nep_dispatch)
  get_target_property(type ${folder} TYPE)
  if(type STREQUAL OBJECT_LIBRARY)
    list(APPEND objects $<TARGET_OBJECTS:${folder}>)
  endif()
endforeach()
set(links Threads::Threads ZLIB::ZLIB PkgConfig::HWLOC m rt ${CMAKE_DL_LIBS})
# Everything, symbols visible: for tests and tools, which also use inner headers.
add_library(nearep_static STATIC ${objects})
set_target_properties(nearep_static PROPERTIES LINKER_LANGUAGE C)
target_link_libraries(nearep_static PUBLIC nep_flags ${links})
