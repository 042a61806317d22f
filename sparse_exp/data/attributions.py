"""What must be said of the photos of each data set that can be fetched."""

ATTRIBUTIONS = {
    "trees": "Photos: National Ecological Observatory Network (NEON); annotations: DeepForest (MIT).",
    "voc": "Photos: Pascal VOC 2007 and 2012 (Everingham and others), under Flickr's terms of use.",
    "coco128": "Photos: COCO train2017, under Flickr's terms of use; annotations: CC BY 4.0.",
}
"""A sentence by generator."""
