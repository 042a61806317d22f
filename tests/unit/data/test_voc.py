from __future__ import annotations

import math

import pytest

from sparse_exp.data.voc import VocAnnotation, VocObject, read_annotation

XML = b"""<?xml version="1.0"?>
<annotation>
  <folder>VOC2007</folder>
  <filename>000001.jpg</filename>
  <size><width>353</width><height>500</height><depth>3</depth></size>
  <object>
    <name> dog </name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
    <bndbox><xmin>48</xmin><ymin>240</ymin><xmax>195.5</xmax><ymax>371</ymax></bndbox>
  </object>
  <object>
    <name>person</name><difficult>1</difficult>
    <bndbox><xmin>8</xmin><ymin>12</ymin><xmax>352</xmax><ymax>498</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></part>
  </object>
</annotation>"""


def test_an_annotation_is_read_as_it_stands():
    assert read_annotation(XML) == VocAnnotation(
        "000001.jpg",
        (353.0, 500.0),
        (
            VocObject("dog", (48.0, 240.0, 195.5, 371.0), difficult=False),
            VocObject("person", (8.0, 12.0, 352.0, 498.0), difficult=True),
        ),
    )


def test_what_is_missing_is_empty():
    annotation = read_annotation(b"<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>")
    assert (annotation.file_name, annotation.size) == ("", (0.0, 0.0))
    (item,) = annotation.objects
    assert (item.name, item.box[0], item.difficult) == ("", 1.0, False)
    assert all(map(math.isnan, item.box[1:]))


@pytest.mark.parametrize("xml", [b"", b"<annotation>", b"no xml", XML.replace(b"48", b"many")])
def test_what_is_no_annotation_is_a_value_error(xml):
    with pytest.raises(ValueError):
        read_annotation(xml)
