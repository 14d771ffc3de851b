"""The whole job on the embedded emoji pictures: data, training, retrieval, classification, a picture grid."""
